"""How does Vision-LSTM (ViL) become a VisionEncoder?

Shapes: T views, S image size, H W feature grid, D encoder width.

Published weights are `.th` files for 224 pixels; `{type: vil, source: .../vil2_tiny16.th}` is
enough, as they tell everything but a stride of 8, for which the architecture is named as well
(`architecture: vil-base-stride8`). Layers are counted as the reference counts blocks: in version 2
a layer is a pair of blocks.

Checked against numbers of the reference's code with random weights (see tests/vlm/encoders/
test_vil.py for how they were made), not with published weights.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from connectors.config import config_from_mapping
from connectors.registry import lookup
from vlm.encoders import vil_keys
from vlm.encoders.base import IMAGENET_224, VisionEncoder, fill, load_strict
from vlm.encoders.drop_path import DropPathConfig
from vlm.encoders.initial_weights import keep
from vlm.encoders.patch_check import check_patches
from vlm.encoders.vil_blocks import EXPAND, HEADS, ViL, ViLArchitecture
from vlm.encoders.vim_blocks import patch_grid
from vlm.encoders.vision_checkpoint import find_checkpoint, read_checkpoint, save_weights
from vlm.errors import UserError

# The published models, by their names in the reference's hubconf.py.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vil2-tiny": {"dim": 192, "depth": 12},
    "vil2-small": {"dim": 384, "depth": 12},
    "vil2-base": {"dim": 768, "depth": 12},
    "vil-tiny": {"version": 1, "dim": 192, "depth": 24},
    "vil-tinyplus": {"version": 1, "dim": 192, "depth": 29},
    "vil-tinyplus-stride8": {"version": 1, "dim": 192, "depth": 29, "stride": 8},
    "vil-small": {"version": 1, "dim": 384, "depth": 24},
    "vil-smallplus": {"version": 1, "dim": 384, "depth": 26},
    "vil-smallplus-stride8": {"version": 1, "dim": 384, "depth": 26, "stride": 8},
    "vil-base": {"version": 1, "dim": 768, "depth": 24},
    "vil-base-stride8": {"version": 1, "dim": 768, "depth": 24, "stride": 8},
}


@dataclass(frozen=True, kw_only=True)
class ViLEncoderConfig(DropPathConfig):
    """ViL: by the name of a published architecture, by its numbers, or by a file of weights.

    `drop_path` is every block's, as the reference's is by default.
    """

    architecture: str | dict | None = None  # a name, or fields of ViLArchitecture


class ViLEncoder(VisionEncoder[ViLEncoderConfig]):
    """Vision-LSTM, both versions, at any size its patches fit."""

    type_name = "vil"
    config_class = ViLEncoderConfig

    def __init__(self, config: ViLEncoderConfig) -> None:
        """Build the layers asked for."""
        super().__init__(config)
        self.architecture = read_architecture(config)
        normed = config.layer == "last"
        self.model = ViL(self.architecture, config.layers, normed, config.drop_path)
        keep(self.model)
        self.settle(config)

    @classmethod
    def resolve(cls, config: ViLEncoderConfig) -> ViLEncoderConfig:
        """Return the config with the architecture's numbers, size, mean and std."""
        config = fill(config, IMAGENET_224)
        architecture = read_architecture(config)
        check_patches("vil", config, architecture)
        return replace(config, architecture=asdict(architecture))

    @classmethod
    def load(cls, config: ViLEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder with the weights of a published file or of a saved folder."""
        source = str(config.source)
        state = vil_keys.model_names(read_checkpoint(find_checkpoint(source)))
        config = cls.resolve(with_stored(config, vil_keys.read_architecture(state, source)))
        encoder = cls(config)
        load_strict(encoder.model, state, source)
        return encoder.to(dtype)

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of pictures (T, 3, S, S)."""
        return self.model(pixel_values)

    def save_weights(self, folder: Path) -> None:
        """Write the weights under the names of the reference's classes."""
        save_weights(self.model, folder)

    def _measure(self) -> list[tuple[int, ...]]:
        """Return the shapes of the feature maps; computing them on the meta device takes long."""
        a, size = self.architecture, (self.image_size, self.image_size)
        assert a.stride is not None
        grid = patch_grid(size, a.patch_size, a.stride)
        return [(2, *grid, a.dim)] * len(self.model.entries)


def read_architecture(config: ViLEncoderConfig) -> ViLArchitecture:
    """Return the numbers of a config whose `image_size` is known, all of them filled in.

    Raises:
        UserError: an unknown name, or fields that are wrong or missing.
    """
    size = config.image_size
    assert size is not None
    if config.architecture is None:
        raise UserError(
            f"vision encoder 'vil' needs an 'architecture': one of {', '.join(ARCHITECTURES)}, or "
            "a mapping such as {dim: 64, depth: 4, patch_size: 8}"
        )
    values = named(config.architecture)
    a = config_from_mapping(ViLArchitecture, values, "vision encoder 'vil': architecture")
    numbers = (a.dim, a.depth, a.patch_size, *(a.position_grid or ()))
    if min(numbers) < 1 or (a.stride is not None and a.stride < 1) or EXPAND * a.dim % HEADS:
        raise UserError(
            "vision encoder 'vil': architecture's numbers must be positive, and dim a multiple of "
            f"{HEADS // EXPAND}, not {a}"
        )
    stride = a.patch_size if a.stride is None else a.stride
    grid = a.position_grid or patch_grid((size, size), a.patch_size, stride)
    legacy_norm = a.legacy_norm and a.version == 1  # version 2 has it in its classifier
    return replace(a, stride=stride, position_grid=grid, legacy_norm=legacy_norm)


def named(architecture: str | dict) -> dict[str, Any]:
    """Return the fields of a named architecture, or those that are given."""
    if isinstance(architecture, dict):
        return architecture
    return lookup("ViL architecture", architecture, ARCHITECTURES)


def with_stored(config: ViLEncoderConfig, stored: ViLArchitecture) -> ViLEncoderConfig:
    """Return the config with what the weights tell, where it does not say it."""
    told = {k: v for k, v in asdict(stored).items() if v is not None}
    given = {} if config.architecture is None else named(config.architecture)
    # A name says nothing of grid and norms; a mapping may leave out what is not its default.
    return replace(config, architecture={**told, **given})
