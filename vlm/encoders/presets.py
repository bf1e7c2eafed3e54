"""What do the short names of vision encoders, such as `clip-l-336`, stand for?

`vision_encoder: {preset: clip-l-336, layer: -1}` in a recipe means the row of that name, with the
user's fields over it. The numbers of every row are tested by building it.

Surprise: a preset fixes size, mean and std, not how a picture is made square: the tiling does that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from connectors.registry import lookup
from vlm.encoders.base import Layer
from vlm.errors import UserError

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and std
OPENAI: Pixels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STAGES = (-4, -3, -2, -1)  # all of a ConvNeXt, the finest first


@dataclass(frozen=True)
class Preset:
    """One encoder; grid, width and parameters are those of what is built, unused layers left out.

    `layer` is what published vision-language models take: -2 of CLIP and SigLIP is LLaVA's and
    LLaVA-NeXT's choice, "last" has the final norm, -1 has not.
    """

    type: str
    source: str | None  # None: a file that the user downloads and names as `source`
    layer: Layer
    image_size: int
    pixels: Pixels
    grid: int  # rows, and columns, of the features
    width: int  # D
    parameters: int
    published: str = ""  # where the weights are; empty: `source` says it
    fields: Mapping[str, Any] = field(default_factory=dict)  # the adapter's own

    def config(self) -> dict[str, Any]:
        """Return the config for `build_vision_encoder` or, with a source, `load_vision_encoder`."""
        mean, std = self.pixels
        values = {"type": self.type, "source": self.source, **self.fields, "layer": self.layer}
        return {**values, "image_size": self.image_size, "image_mean": mean, "image_std": std}


@dataclass(frozen=True)
class SeveralPreset:
    """Encoders side by side: for each a preset, fields that differ, and its grid's side."""

    encoders: tuple[tuple[str, Mapping[str, Any], int], ...]
    widths: tuple[int, ...]  # D of each map; stages are joined, an encoder with tiles has two maps
    parameters: int
    published: str  # which model has them
    fields: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Return the config for `build_vision_encoder` or `load_vision_encoder`."""
        parts = [expand_preset({"preset": name, **changes}) for name, changes, _ in self.encoders]
        sides = [side for _, _, side in self.encoders]
        return {"type": "several", "encoders": parts, "resize_to": sides, **self.fields}


# For models of transformers: what their `config.json` on the hub would say.
CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP_SO400M: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DINOV2_G: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 1536,
    "mlp_ratio": 4,
    "use_swiglu_ffn": True,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "patch_size": 14,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
}
# 45 layers, as InternViT-6B-448px-V1-2, V1-5 and V2_5 have. Those repositories need their own code;
# in the format of transformers the tower is published inside large InternVL models (`-hf`), trained
# on together with them, and that is what can be loaded.
INTERNVIT_6B: dict[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "patch_size": [14, 14],
    "image_size": [448, 448],
    "norm_type": "rms_norm",
    "use_qk_norm": True,
    "attention_bias": False,
    "layer_norm_eps": 1e-6,
}

# Two lines a model: type and source; then layer, size, mean and std, grid, width, parameters.
# fmt: off
ENCODERS: dict[str, Preset] = {
    # Trained on pictures and their texts
    "clip-l-336": Preset(
        "transformers", "openai/clip-vit-large-patch14-336",
        -2, 336, OPENAI, 24, 1024, 290_909_184, fields={"architecture": CLIP_L}),
    "openclip-bigg": Preset(
        "timm", "vit_gigantic_patch14_clip_224.laion2b",
        -2, 224, OPENAI, 16, 1664, 1_804_412_288),
    "siglip-so400m-384": Preset(
        "transformers", "google/siglip-so400m-patch14-384",
        -2, 384, HALF, 27, 1152, 397_745_440, fields={"architecture": SIGLIP_SO400M}),
    "siglip2-so400m-378": Preset(
        "timm", "vit_so400m_patch14_siglip_378.v2_webli",
        "last", 378, HALF, 27, 1152, 412_987_248),
    "siglip2-so400m-384": Preset(
        "timm", "vit_so400m_patch16_siglip_384.v2_webli",
        "last", 384, HALF, 24, 1152, 413_018_352),
    "siglip2-so400m-512": Preset(
        "timm", "vit_so400m_patch16_siglip_512.v2_webli",
        "last", 512, HALF, 32, 1152, 413_534_448),
    "eva02-clip-l-336": Preset(
        "timm", "eva02_large_patch14_clip_336.merged2b",
        -2, 336, OPENAI, 24, 1024, 291_041_560),
    "eva02-clip-e": Preset(
        "timm", "eva02_enormous_patch14_clip_224.laion2b_plus",
        -2, 224, OPENAI, 16, 1792, 4_280_792_320),
    "eva-clip-g": Preset(
        "timm", "eva_giant_patch14_clip_224.laion400m",
        -2, 224, OPENAI, 16, 1408, 985_894_528),
    "aimv2-l-336": Preset(
        "timm", "aimv2_large_patch14_336.apple_pt",
        "last", 336, OPENAI, 24, 1024, 309_525_504),
    "convnext-l-768": Preset(
        "timm", "convnext_large_mlp.clip_laion2b_ft_soup_320",
        -1, 768, OPENAI, 24, 1536, 196_227_264),
    "convnext-xxl-1024": Preset(
        "timm", "convnext_xxlarge.clip_laion2b_soup",
        -1, 1024, OPENAI, 32, 3072, 843_391_872),
    # Trained for, or with, language models
    "internvit-300m-448": Preset(
        "timm", "vit_intern300m_patch14_448.ogvl_2pt5",
        -1, 448, IMAGENET, 32, 1024, 304_012_288),
    "internvit-6b-448": Preset(
        "transformers", "OpenGVLab/InternVL3-38B-hf",
        -1, 448, IMAGENET, 32, 3200, 5_536_496_000, fields={"architecture": INTERNVIT_6B}),
    "pe-spatial-l-448": Preset(
        "timm", "vit_pe_spatial_large_patch14_448.fb",
        "last", 448, HALF, 32, 1024, 303_964_160),
    # Trained on pictures alone
    "dinov2-l": Preset(
        "timm", "vit_large_patch14_dinov2.lvd142m",
        "last", 518, IMAGENET, 37, 1024, 304_367_616),
    "dinov2-l-reg4": Preset(
        "timm", "vit_large_patch14_reg4_dinov2.lvd142m",
        "last", 518, IMAGENET, 37, 1024, 304_370_688),
    "dinov2-g-378": Preset(
        "transformers", "facebook/dinov2-giant",
        "last", 378, IMAGENET, 27, 1536, 1_136_479_232, fields={"architecture": DINOV2_G}),
    "dinov3-l": Preset(
        "timm", "vit_large_patch16_dinov3.lvd1689m",
        "last", 256, IMAGENET, 16, 1024, 303_079_424),
    # Trained on ImageNet's classes, without attention
    "mambaout-tiny": Preset(
        "timm", "mambaout_tiny.in1k",
        "last", 224, IMAGENET, 7, 576, 22_906_080),
    "mambaout-small": Preset(
        "timm", "mambaout_small.in1k",
        "last", 224, IMAGENET, 7, 576, 44_849_056),
    "mambaout-base": Preset(
        "timm", "mambaout_base.in1k",
        "last", 224, IMAGENET, 7, 768, 79_371_580),
    "mambaout-base-plus-384": Preset(
        "timm", "mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k",
        "last", 384, IMAGENET, 12, 768, 96_221_184),
    # The same; their weights are files to download, named as `source` beside the preset
    "vim-tiny": Preset(
        "vim", None,
        "last", 224, IMAGENET, 14, 192, 6_955_008,
        "hf.co/hustvl/Vim-tiny-midclstok",
        {"architecture": "vim_tiny"}),
    "vim-small": Preset(
        "vim", None,
        "last", 224, IMAGENET, 14, 384, 25_411_584,
        "hf.co/hustvl/Vim-small-midclstok",
        {"architecture": "vim_small"}),
    "vim-base": Preset(
        "vim", None,
        "last", 224, IMAGENET, 14, 768, 96_829_440,
        "hf.co/hustvl/Vim-base-midclstok",
        {"architecture": "vim_base"}),
    "vim-tiny-stride8": Preset(
        "vim", None,
        "last", 224, IMAGENET, 27, 192, 7_057_344,
        "hf.co/hustvl/Vim-tiny-midclstok, the file fine-tuned at stride 8",
        {"architecture": "vim_tiny_stride8"}),
    "vim-small-stride8": Preset(
        "vim", None,
        "last", 224, IMAGENET, 27, 384, 25_616_256,
        "hf.co/hustvl/Vim-small-midclstok, the file fine-tuned at stride 8",
        {"architecture": "vim_small_stride8"}),
    "vmamba-tiny-s1l8": Preset(
        "vmamba", None,
        "last", 224, IMAGENET, 14, 1152, 29_480_832,
        "github.com/MzeroMiko/VMamba, release #v2cls, vssm1_tiny_0230s",
        {"architecture": "vmamba_tiny_s1l8"}),
    "vmamba-tiny-s2l5": Preset(
        "vmamba", None,
        "last", 224, IMAGENET, 14, 1152, 29_937_600,
        "github.com/MzeroMiko/VMamba, release #v2cls, vssm_tiny_0230",
        {"architecture": "vmamba_tiny_s2l5"}),
    "vmamba-small-s2l15": Preset(
        "vmamba", None,
        "last", 224, IMAGENET, 14, 1152, 49_379_520,
        "github.com/MzeroMiko/VMamba, release #v2cls, vssm_small_0229",
        {"architecture": "vmamba_small_s2l15"}),
    "vmamba-small-s1l20": Preset(
        "vmamba", None,
        "last", 224, IMAGENET, 14, 1152, 48_244_608,
        "github.com/MzeroMiko/VMamba, release #v2cls, vssm1_small_0229s",
        {"architecture": "vmamba_small_s1l20"}),
    "vmamba-base-s2l15": Preset(
        "vmamba", None,
        "last", 224, IMAGENET, 14, 1536, 87_533_824,
        "github.com/MzeroMiko/VMamba, release #v2cls, vssm_base_0229",
        {"architecture": "vmamba_base_s2l15"}),
    "vmamba-base-s1l20": Preset(
        "vmamba", None,
        "last", 224, IMAGENET, 14, 1536, 85_590_528,
        "github.com/MzeroMiko/VMamba, release #v2cls, vssm1_base_0229s",
        {"architecture": "vmamba_base_s1l20"}),
    "vil2-tiny": Preset(
        "vil", None,
        "last", 224, IMAGENET, 14, 192, 6_005_760,
        "github.com/NX-AI/vision-lstm, its README, vil2-tiny",
        {"architecture": "vil2-tiny"}),
    "vil2-small": Preset(
        "vil", None,
        "last", 224, IMAGENET, 14, 384, 22_628_160,
        "github.com/NX-AI/vision-lstm, its README, vil2-small",
        {"architecture": "vil2-small"}),
    "vil2-base": Preset(
        "vil", None,
        "last", 224, IMAGENET, 14, 768, 87_723_456,
        "github.com/NX-AI/vision-lstm, its README, vil2-base",
        {"architecture": "vil2-base"}),
}
# fmt: on

SEVERAL: dict[str, SeveralPreset] = {
    # Cambrian's scripts: --vision_tower_aux_list and --vision_tower_aux_token_len_list
    # [576, 576, 576, 9216]; the stages of its ConvNeXt are joined
    "cambrian-four": SeveralPreset(
        encoders=(
            ("siglip-so400m-384", {"layer": "last"}, 24),
            ("clip-l-336", {}, 24),
            ("dinov2-g-378", {}, 24),
            ("convnext-xxl-1024", {"layer": STAGES}, 96),
        ),
        widths=(1152, 1024, 1536, 5760),
        parameters=2_683_767_536,
        published="nyu-visionx/cambrian-8b, -13b and -34b",
    ),
    # MGM's openclip_encoder.py joins the stages at the first one's size; its pictures for CLIP are
    # made from those for the ConvNeXt without antialiasing
    "mini-gemini-two": SeveralPreset(
        encoders=(("clip-l-336", {}, 24), ("convnext-l-768", {"layer": STAGES}, 192)),
        widths=(1024, 2880),
        parameters=487_136_448,
        published="YanweiLi/MGM-7B and others",
        fields={"downscale": "bilinear"},
    ),
    # The HD models' image_size_aux 1536 and image_grid 2
    "mini-gemini-two-hd": SeveralPreset(
        encoders=(
            ("clip-l-336", {}, 24),
            ("convnext-l-768", {"layer": STAGES, "image_size": 1536}, 384),
        ),
        widths=(1024, 1024, 2880),
        parameters=487_136_448,
        published="YanweiLi/MGM-7B-HD and others",
        fields={"downscale": "bilinear", "tiles": (2, 1)},
    ),
    # Prismatic and Cobra: the last but one of each, joined by a connector of one grid
    "dinosiglip-384": SeveralPreset(
        encoders=(
            ("dinov2-l-reg4", {"layer": -2, "image_size": 384}, 27),
            ("siglip-so400m-384", {}, 27),
        ),
        widths=(1024, 1152),
        parameters=688_860_448,
        published="TRI-ML/prismatic-vlms, prism-dinosiglip+7b; han1997/cobra",
    ),
}

# Sizes by their letter; of VMamba's two models of a size, the more accurate one on ImageNet.
SHORT = {
    "vim-t": "vim-tiny",
    "vim-s": "vim-small",
    "vim-b": "vim-base",
    "vmamba-t": "vmamba-tiny-s1l8",
    "vmamba-s": "vmamba-small-s2l15",
    "vmamba-b": "vmamba-base-s2l15",
}

PRESETS: Mapping[str, Preset | SeveralPreset] = {
    **ENCODERS,
    **SEVERAL,
    **{short: ENCODERS[name] for short, name in SHORT.items()},
}


def published_at(config: Any) -> str:
    """Return where the weights of a config's preset are to be had; "" where nothing is known."""
    name = config.get("preset") if isinstance(config, Mapping) else None
    return PRESETS[name].published if isinstance(name, str) and name in PRESETS else ""


def expand_preset(config: Any) -> Any:
    """Return `{"preset": name, fields}` as the preset's config with the fields over it.

    Anything without a preset comes back as it is, so this may be called on any config.

    Raises:
        UserError: unknown name, or a type beside the preset, which has one.
    """
    if not isinstance(config, Mapping) or "preset" not in config:
        return config
    changes = dict(config)
    name = changes.pop("preset")
    if not isinstance(name, str):
        raise UserError(f"vision_encoder.preset must be a name such as clip-l-336, not {name!r}")
    expanded = lookup("vision encoder preset", name, PRESETS).config()
    if "type" in changes:
        raise UserError(
            f"vision_encoder has the preset {name!r}, of type {expanded['type']}, and a type, "
            f"{changes['type']!r}; leave out one of them"
        )
    return {**expanded, **changes}
