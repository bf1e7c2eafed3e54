"""How does Vision Mamba (Vim) become a VisionEncoder?

Shapes: T views, S image size, H W feature grid, D encoder width.

Published weights are `.pth` files on the hub (hustvl/Vim-tiny-midclstok, -small-, -base-), made for
224 pixels: `{type: vim, architecture: vim_small, source: .../vim_s_midclstok_80p5acc.pth}`.
Surprise: the number of stored positions is read from the file, so any `image_size` can be asked
for; the positions are resized in every forward pass to the picture's grid (2 ms at 24 x 24 for
Vim-S on one core, of 700 ms for the pass).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from connectors.config import config_from_mapping
from connectors.registry import lookup
from vlm.encoders.base import IMAGENET_224, VisionEncoder, fill, load_strict
from vlm.encoders.drop_path import DropPathConfig
from vlm.encoders.initial_weights import keep
from vlm.encoders.patch_check import check_patches
from vlm.encoders.position_resize import Rule
from vlm.encoders.vim_blocks import TOKEN_NAMES, Vim, VimArchitecture, patch_grid
from vlm.encoders.vision_checkpoint import find_checkpoint, read_checkpoint, save_weights
from vlm.errors import UserError

# The published models; everything else is `VimArchitecture`'s default.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vim_tiny": {"embed_dim": 192, "depth": 24},
    "vim_small": {"embed_dim": 384, "depth": 24},
    "vim_base": {"embed_dim": 768, "depth": 24},
    "vim_tiny_stride8": {"embed_dim": 192, "depth": 24, "stride": 8},
    "vim_small_stride8": {"embed_dim": 384, "depth": 24, "stride": 8},
}


@dataclass(frozen=True, kw_only=True)
class VimEncoderConfig(DropPathConfig):
    """Vim: by the name of a published architecture, or by its numbers.

    Layer "last" goes through the final norm; so the published models' features were trained.
    `drop_path` is the last block's, the first has none; 0.05 in the small model's pretraining.
    """

    architecture: str | dict | None = None  # a name, or fields of VimArchitecture
    position_resize: Rule = "middle"  # see position_resize.py; "official" is the reference's


class VimEncoder(VisionEncoder[VimEncoderConfig]):
    """Vim with any of its directions, class tokens and strides, at any size its patches fit."""

    type_name = "vim"
    config_class = VimEncoderConfig

    def __init__(self, config: VimEncoderConfig) -> None:
        """Build the layers asked for."""
        super().__init__(config)
        self.architecture = read_architecture(config)
        normed, rate = config.layer == "last", config.drop_path
        self.model = Vim(self.architecture, config.layers, normed, rate, config.position_resize)
        keep(self.model)
        self.settle(config)

    @classmethod
    def resolve(cls, config: VimEncoderConfig) -> VimEncoderConfig:
        """Return the config with the architecture's numbers, size, mean and std."""
        config = fill(config, IMAGENET_224)
        architecture = read_architecture(config)
        check_patches("vim", config, architecture)
        return replace(config, architecture=asdict(architecture))

    @classmethod
    def load(cls, config: VimEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder with the weights of a published file or of a saved folder."""
        source = str(config.source)
        state = read_checkpoint(find_checkpoint(source))
        config = cls.resolve(with_stored_grid(config, state))
        encoder = cls(config)
        load_strict(encoder.model, state, source)
        return encoder.to(dtype)

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of pictures (T, 3, S, S), class tokens removed."""
        return self.model(pixel_values)

    def save_weights(self, folder: Path) -> None:
        """Write the weights under the published names."""
        save_weights(self.model, folder)

    def _measure(self) -> list[tuple[int, ...]]:
        """Return the shapes of the feature maps; computing them on the meta device takes long."""
        a, size = self.architecture, (self.image_size, self.image_size)
        assert a.stride is not None
        return [(2, *patch_grid(size, a.patch_size, a.stride), a.embed_dim)] * len(
            self.model.entries
        )


def read_architecture(config: VimEncoderConfig) -> VimArchitecture:
    """Return the numbers of a config whose `image_size` is known, all of them filled in.

    Raises:
        UserError: an unknown name, or fields that are wrong or missing.
    """
    values, size = config.architecture, config.image_size
    assert size is not None
    if values is None:
        raise UserError(
            f"vision encoder 'vim' needs an 'architecture': one of {', '.join(ARCHITECTURES)}, or "
            "a mapping such as {embed_dim: 192, depth: 12, patch_size: 8}"
        )
    if isinstance(values, str):
        values = lookup("Vim architecture", values, ARCHITECTURES)
    a = config_from_mapping(VimArchitecture, values, "vision encoder 'vim': architecture")
    numbers = (a.embed_dim, a.depth, a.patch_size, a.state_dim, a.conv_width, a.expand)
    optional = (a.stride, a.step_rank, *(a.position_grid or ()))
    if min(*numbers, *(n for n in optional if n is not None)) < 1 or a.norm_eps <= 0:
        raise UserError(f"vision encoder 'vim': architecture's numbers must be positive, not {a}")
    stride = a.patch_size if a.stride is None else a.stride
    grid = a.position_grid or patch_grid((size, size), a.patch_size, stride)
    rank = a.step_rank
    if rank is None and a.mixer == "mamba":
        rank = math.ceil(a.embed_dim / 16)
    return replace(a, stride=stride, position_grid=grid, step_rank=rank)


def with_stored_grid(config: VimEncoderConfig, state: dict[str, Tensor]) -> VimEncoderConfig:
    """Return the config with the grid of the stored positions, where it does not say it.

    Raises:
        UserError: there are no positions, or not as many as a square has.
    """
    named = config.architecture
    values = dict(ARCHITECTURES.get(named, {})) if isinstance(named, str) else dict(named or {})
    if "embed_dim" not in values or values.get("position_grid") is not None:
        return config  # wrong, which `resolve` says, or complete
    if "pos_embed" not in state:
        raise UserError(f"{config.source} holds no weights of Vim: it has no 'pos_embed'")
    kind = values.get("class_token", VimArchitecture.class_token)
    patches = state["pos_embed"].shape[1] - len(TOKEN_NAMES.get(kind, ()))
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise UserError(
            f"{config.source} has positions for {patches} patches, which is no square; set "
            "vision_encoder.architecture to a mapping with its numbers, position_grid among them"
        )
    return replace(config, architecture={**values, "position_grid": (side, side)})
