"""Which tiny encoders do the tests use? One of each family, random, depth 3."""

from typing import Any

import pytest
import torch

from vlm.encoders import VisionEncoder, build_vision_encoder

MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def of_transformers(model_type: str, **changes: Any) -> dict[str, Any]:
    architecture = {"model_type": model_type, **VIT, **changes}
    if model_type.startswith("dinov2"):
        del architecture["intermediate_size"]  # they have a ratio
    means = {"image_mean": MEAN, "image_std": STD}
    return {"type": "transformers", **means, "architecture": architecture}


TINY: dict[str, dict[str, Any]] = {
    "clip": of_transformers("clip_vision_model"),
    "siglip": of_transformers("siglip_vision_model"),
    "dinov2": of_transformers("dinov2"),
    "dinov2_registers": of_transformers("dinov2_with_registers", num_register_tokens=4),
    "internvl": of_transformers("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
    "internvl_normed": of_transformers("internvl_vision", use_mean_pooling=False),
    "timm_vit": {
        "type": "timm",
        "source": "vit_tiny_patch16_224",
        "image_size": 32,
        "model_args": {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8},
    },
    "timm_vit_avg": {  # its final norm is `fc_norm`
        "type": "timm",
        "source": "vit_tiny_patch16_224",
        "image_size": 32,
        "model_args": {
            "embed_dim": 16,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 8,
            "global_pool": "avg",
        },
    },
    "timm_eva_registers": {  # positions are rotary, in a buffer
        "type": "timm",
        "source": "vit_small_patch16_dinov3",
        "image_size": 32,
        "model_args": {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8},
    },
    "timm_swin": {  # its tables of relative positions are in buffers; it is channels last inside
        "type": "timm",
        "source": "swin_tiny_patch4_window7_224",
        "image_size": 64,
        "model_args": {
            "depths": [1, 1],
            "embed_dim": 12,
            "num_heads": [2, 2],
            "window_size": 4,
            "patch_size": 4,
        },
    },
    "timm_convnext": {
        "type": "timm",
        "source": "convnext_atto",
        "image_size": 64,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},
    },
    "timm_mambaout": {
        "type": "timm",
        "source": "mambaout_femto",
        "image_size": 64,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]},
    },
    "vim": {
        "type": "vim",
        "image_size": 32,
        "architecture": {"embed_dim": 16, "depth": 3, "patch_size": 8},
    },
    "vim_mamba2": {
        "type": "vim",
        "image_size": 32,
        "architecture": {
            "embed_dim": 16,
            "depth": 3,
            "patch_size": 8,
            "mixer": "mamba2",
            "head_dim": 8,
        },
    },
    "vim_head": {  # one class token at the start, one convolution for both directions, a factor
        "type": "vim",
        "image_size": 32,
        "architecture": {
            "embed_dim": 16,
            "depth": 3,
            "patch_size": 8,
            "class_token": "head",
            "directions": "v1",
            "layer_scale": 0.1,
        },
    },
    "vim_double_overlap": {  # a class token at each end; patches of 8 pixels every 4
        "type": "vim",
        "image_size": 32,
        "architecture": {
            "embed_dim": 16,
            "depth": 3,
            "patch_size": 8,
            "stride": 4,
            "class_token": "double",
        },
    },
    "vim_plain": {  # no class token, one direction
        "type": "vim",
        "image_size": 32,
        "architecture": {
            "embed_dim": 16,
            "depth": 3,
            "patch_size": 8,
            "class_token": "none",
            "directions": "none",
        },
    },
    "vmamba_v0": {  # the first version: a gate, more states, no MLP, Swin's stem
        "type": "vmamba",
        "image_size": 64,
        "architecture": {
            "depths": [1, 1, 1],
            "dims": [8, 12, 16],
            "state_dim": 4,
            "conv_bias": True,
            "forward_type": "v0",
            "mlp_ratio": 0,
            "stem": "v1",
            "downsample": "v1",
        },
    },
    "vil_v1": {
        "type": "vil",
        "image_size": 32,
        "architecture": {"version": 1, "dim": 16, "depth": 3, "patch_size": 8},
    },
    "vmamba": {
        "type": "vmamba",
        "image_size": 64,
        "architecture": {"depths": [1, 1, 1], "dims": [8, 12, 16]},
    },
    "vil": {
        "type": "vil",
        "image_size": 32,
        "architecture": {"dim": 16, "depth": 2, "patch_size": 8},
    },
    "open_clip_vit": {
        "type": "open_clip",
        "architecture": {
            "embed_dim": 16,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": 32,
                "layers": 3,
                "width": 16,
                "head_width": 8,
                "patch_size": 8,
            },
        },
    },
    "open_clip_timm": {
        "type": "open_clip",
        "image_size": 64,
        "architecture": {
            "embed_dim": 16,
            "quick_gelu": False,
            "vision_cfg": {
                "timm_model_name": "test_convnext",
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 64,
            },
        },
    },
}


def build(name: str, seed: int = 0, **changes: Any) -> VisionEncoder:
    """Build a tiny encoder whose every parameter is random: fresh norms would hide mistakes."""
    torch.manual_seed(seed)
    return randomise(build_vision_encoder({**TINY[name], **changes}).eval())


def randomise(model: torch.nn.Module) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if parameter.ndim == 1:
            parameter.data += 0.5
    return model


def pictures(encoder: VisionEncoder, views: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = encoder.image_size
    return torch.randn(views, 3, size, size, generator=generator)


@pytest.fixture
def tiny() -> dict[str, dict[str, Any]]:
    return TINY


@pytest.fixture(name="build")
def build_fixture() -> Any:
    return build


@pytest.fixture(name="pictures")
def pictures_fixture() -> Any:
    return pictures


@pytest.fixture(name="randomise")
def randomise_fixture() -> Any:
    return randomise
