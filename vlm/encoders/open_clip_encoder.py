"""How does the image tower of an OpenCLIP model become a VisionEncoder?

Shapes: T views, S image size, H W feature grid, D encoder width.

Surprises:
- Weights trained with QuickGELU need it, and the name alone does not say so (`ViT-L-14` with the
  tag `openai` does); here the tag decides.
- Towers such as ConvNeXt or SigLIP are timm models inside (`visual.trunk`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.encoders import timm_features
from vlm.encoders.base import CONFIG_FILE, EncoderConfig, VisionEncoder, fill, load_strict
from vlm.encoders.timm_encoder import WEIGHTS_FILE, read_weights
from vlm.errors import UserError

SCHEMES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True, kw_only=True)
class OpenClipEncoderConfig(EncoderConfig):
    """A model of OpenCLIP: by name, by `hf-hub:` id, or a folder with `open_clip_config.json`."""

    pretrained: str | None = None  # tag ("openai", "laion2b_s32b_b82k") or file of the weights
    architecture: dict | None = None  # embed_dim, vision_cfg and quick_gelu of the model's config


class OpenClipEncoder(VisionEncoder[OpenClipEncoderConfig]):
    """The image tower of an OpenCLIP model: its own ViT, or a timm model."""

    type_name = "open_clip"
    config_class = OpenClipEncoderConfig
    gradient_checkpointing = False  # transformers sets it on every module that has it

    def __init__(self, config: OpenClipEncoderConfig, tower: Any = None) -> None:
        """Build the tower, or take a loaded one, and drop what makes no features."""
        super().__init__(config)
        self.normed = config.layer == "last"
        self.model = build_tower(config) if tower is None else tower
        name = config.source or "the architecture"
        trunk = dict(self.model.named_children()).get("trunk")
        self.is_timm = trunk is not None
        if trunk is not None:
            self.model = trunk  # the rest of the tower projects to the text's space
            self.positions = timm_features.prune(trunk, config, name)
        else:
            self.positions = prune_vit(self.model, config, name)
        self.settle(config)

    @classmethod
    def resolve(cls, config: OpenClipEncoderConfig) -> OpenClipEncoderConfig:
        """Return the config with architecture, size, mean and std from OpenCLIP's records."""
        open_clip = import_open_clip()
        found: dict[str, Any] = {}
        architecture = config.architecture
        preprocess: dict[str, Any] = {}
        if architecture is None:
            architecture, preprocess = read_architecture(open_clip, config)
            found["architecture"] = architecture
        found["image_size"] = architecture["vision_cfg"]["image_size"]
        found["image_mean"] = tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN)
        found["image_std"] = tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
        return fill(config, found)

    @classmethod
    def load(cls, config: OpenClipEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder with the weights of a tag, a file, a hub id or a folder."""
        open_clip = import_open_clip()
        assert config.source is not None
        resolved = cls.resolve(config)
        folder = Path(config.source)
        if (folder / CONFIG_FILE).is_file():
            encoder = cls(resolved)
            load_strict(encoder.model, read_weights(folder / WEIGHTS_FILE), config.source)
            return encoder.to(dtype)
        name = source_name(config.source)
        if not name.startswith(SCHEMES) and config.pretrained is None:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "a file"
            raise UserError(
                f"vision encoder 'open_clip': {name} needs 'pretrained', one of {tags}, or a file"
            )
        assert resolved.architecture is not None
        try:
            model = open_clip.create_model(
                name,
                pretrained=config.pretrained,
                force_quick_gelu=resolved.architecture["quick_gelu"],
                force_image_size=resolved.image_size,
                pretrained_text=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise unloadable(config, error) from error
        return cls(resolved, model.visual).to(dtype)

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of pictures (T, 3, S, S), class token dropped."""
        timm_features.recompute(self.model, self.gradient_checkpointing and self.training)
        if self.is_timm:
            return timm_features.extract(self.model, pixel_values, self.positions, self.normed)
        ascending = sorted(set(self.positions))  # the order in which they come back
        output = self.model.forward_intermediates(
            pixel_values,
            indices=ascending,
            stop_early=True,
            normalize_intermediates=self.normed,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        maps = output["image_intermediates"]
        return [maps[ascending.index(position)].permute(0, 2, 3, 1) for position in self.positions]

    def save_weights(self, folder: Path) -> None:
        """Write the weights under OpenCLIP's names for the tower."""
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def import_open_clip() -> Any:
    """Import open_clip, which is an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise UserError(
            "vision encoder 'open_clip' needs the library open_clip; "
            "it comes with: make extras EXTRAS=open_clip"
        ) from error
    return open_clip


def build_tower(config: OpenClipEncoderConfig) -> Any:
    """Return the image tower of the resolved config with new weights."""
    import_open_clip()
    # The one function of open_clip that builds a tower without its text part.
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    assert config.architecture is not None
    values = {**config.architecture["vision_cfg"], "image_size": config.image_size}
    values["timm_model_pretrained"] = False
    try:
        vision = CLIPVisionCfg(**values)
        return _build_vision_tower(
            config.architecture["embed_dim"], vision, config.architecture["quick_gelu"]
        )
    except (TypeError, KeyError) as error:
        raise UserError(f"vision encoder 'open_clip': bad architecture: {error}") from error


def prune_vit(tower: Any, config: OpenClipEncoderConfig, name: str) -> list[int]:
    """Drop the projection and all layers above the highest one asked for, in place.

    Returns:
        The positions of the layers asked for, counted from the first.

    Raises:
        UserError: the tower gives no feature maps, or has not so many layers.
    """
    if not hasattr(tower, "prune_intermediate_layers") or tower.attn_pool is not None:
        raise UserError(
            f"vision encoder 'open_clip': the image tower of {name} gives no feature maps here"
        )
    try:
        return tower.prune_intermediate_layers(
            list(config.layers), prune_norm=config.layer != "last", prune_head=True
        )
    except AssertionError as error:  # what open_clip says to a position out of range
        raise UserError(f"vision encoder: layer {config.layer} of {name}: {error}") from error


def source_name(source: str) -> str:
    """Return the source as open_clip wants it: folders with their scheme."""
    return f"local-dir:{source}" if Path(source).is_dir() else source


def read_architecture(
    open_clip: Any, config: OpenClipEncoderConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (architecture, preprocessing) of the source.

    Raises:
        UserError: no such model, folder or hub id.
    """
    if config.source is None:
        raise UserError("vision encoder 'open_clip' needs a 'source' or an 'architecture'")
    name = source_name(config.source)
    preprocess: dict[str, Any] = {}
    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            model, preprocess = values["model_cfg"], values.get("preprocess_cfg", {})
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise unloadable(config, error) from error
    elif name.startswith("hf-hub:"):
        try:
            file = open_clip.pretrained.download_pretrained_from_hf(
                name.removeprefix("hf-hub:"), filename="open_clip_config.json"
            )
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            model, preprocess = values["model_cfg"], values.get("preprocess_cfg", {})
        except (OSError, KeyError) as error:
            raise unloadable(config, error) from error
    else:
        model = open_clip.get_model_config(name)
        if model is None:
            raise unloadable(config, ValueError("it is no model of open_clip.list_models()"))
        preprocess = open_clip.get_pretrained_cfg(name, config.pretrained or "")
        model["quick_gelu"] = preprocess.get("quick_gelu", model.get("quick_gelu", False))
    architecture = {name: model[name] for name in ("embed_dim", "vision_cfg")}
    return {**architecture, "quick_gelu": model.get("quick_gelu", False)}, preprocess


def unloadable(config: OpenClipEncoderConfig, error: Exception) -> UserError:
    """Return the error for a model that open_clip cannot load."""
    reason = str(error).strip().partition("\n")[0]
    what = f"{config.source!r}" + (f" with {config.pretrained!r}" if config.pretrained else "")
    return UserError(f"vision encoder 'open_clip': cannot load {what}: {reason}")
