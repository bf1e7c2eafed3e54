"""How does VMamba become a VisionEncoder?

Shapes: T views, S image size, H W feature grid, D encoder width.

Published weights are `.pth` files, assets of the releases of MzeroMiko/VMamba (tag `#v2cls`), made
for 224 pixels: `{type: vmamba, architecture: vmamba_tiny_s1l8, source: .../vssm1_tiny_0230s_...}`.
There is no position embedding, so any size will do; features of layer "last" are the last two
stages joined at the grid of the one before the last (see vmamba_model.py).
"""

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
from vlm.encoders.vision_checkpoint import find_checkpoint, read_checkpoint, save_weights
from vlm.encoders.vmamba_blocks import VMambaArchitecture
from vlm.encoders.vmamba_keys import from_published, with_output_norms
from vlm.encoders.vmamba_model import Output, VMamba, map_shapes
from vlm.errors import UserError

TINY, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
# What the first version has in common ("vanilla"): a gate, 16 states, no MLP, Swin's stem.
VANILLA = {
    "ssm_ratio": 2.0,
    "state_dim": 16,
    "conv_bias": True,
    "forward_type": "v0",
    "mlp_ratio": 0.0,
    "stem": "v1",
    "downsample": "v1",
}
# The published models by their names in vmamba.py; everything else is VMambaArchitecture's default.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": {"depths": (2, 2, 8, 2), "dims": TINY, "ssm_ratio": 1.0},
    "vmamba_tiny_s2l5": {"depths": (2, 2, 5, 2), "dims": TINY},
    "vmamba_small_s2l15": {"depths": (2, 2, 15, 2), "dims": TINY},
    "vmamba_small_s1l20": {"depths": (2, 2, 20, 2), "dims": TINY, "ssm_ratio": 1.0},
    "vmamba_base_s2l15": {"depths": (2, 2, 15, 2), "dims": BASE},
    "vmamba_base_s1l20": {"depths": (2, 2, 20, 2), "dims": BASE, "ssm_ratio": 1.0},
    "vanilla_vmamba_tiny": {"depths": (2, 2, 9, 2), "dims": TINY, **VANILLA},
    "vanilla_vmamba_small": {"depths": (2, 2, 27, 2), "dims": TINY, **VANILLA},
    "vanilla_vmamba_base": {"depths": (2, 2, 27, 2), "dims": BASE, **VANILLA},
}
# The same models by the names of their settings and of their files.
FILE_NAMES: dict[str, str] = {
    "vssm1_tiny_0230s": "vmamba_tiny_s1l8",
    "vssm_tiny_0230": "vmamba_tiny_s2l5",
    "vssm_small_0229": "vmamba_small_s2l15",
    "vssm1_small_0229s": "vmamba_small_s1l20",
    "vssm_base_0229": "vmamba_base_s2l15",
    "vssm1_base_0229s": "vmamba_base_s1l20",
}


@dataclass(frozen=True, kw_only=True)
class VMambaEncoderConfig(DropPathConfig):
    """VMamba: by the name of a published architecture, or by its numbers.

    `drop_path` is the last block's, the first has none; 0.2 to 0.6 in the pretraining.
    """

    architecture: str | dict | None = None  # a name, or fields of VMambaArchitecture
    join_stages: bool = True  # layer "last": the last two stages as one map, or the last alone

    @property
    def output(self) -> Output:
        """Return what `VMamba` calls the maps asked for."""
        if self.layer == "last":
            return "joined" if self.join_stages else "normed"
        return self.layers


class VMambaEncoder(VisionEncoder[VMambaEncoderConfig]):
    """VMamba of the published kinds, at any size; layers count stages."""

    type_name = "vmamba"
    config_class = VMambaEncoderConfig

    def __init__(self, config: VMambaEncoderConfig) -> None:
        """Build the stages asked for."""
        super().__init__(config)
        self.architecture = read_architecture(config)
        self.output: Output = config.output
        self.model = VMamba(self.architecture, self.output, config.drop_path)
        keep(self.model)
        self.settle(config)

    @classmethod
    def resolve(cls, config: VMambaEncoderConfig) -> VMambaEncoderConfig:
        """Return the config with the architecture's numbers, size, mean and std."""
        config = fill(config, IMAGENET_224)
        architecture = read_architecture(config)
        check(config, architecture)
        return replace(config, architecture=asdict(architecture))

    @classmethod
    def load(cls, config: VMambaEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder with the weights of a published file or of a saved folder."""
        config, source = cls.resolve(config), str(config.source)
        encoder = cls(config)
        state = from_published(read_checkpoint(find_checkpoint(source)))
        if encoder.output == "joined":
            dims = encoder.architecture.dims
            state = with_output_norms(state, len(dims), dims[-2])
        load_strict(encoder.model, state, source)
        return encoder.to(dtype)

    def extract(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Return the feature maps (T, H, W, D) of pictures (T, 3, S, S)."""
        return self.model(pixel_values)

    def save_weights(self, folder: Path) -> None:
        """Write the weights under the training code's names."""
        save_weights(self.model, folder)

    def _measure(self) -> list[tuple[int, ...]]:
        """Return the shapes of the feature maps; computing them on the meta device takes long."""
        size = (self.image_size, self.image_size)
        return [(2, *shape) for shape in map_shapes(self.architecture, self.output, size)]


def read_architecture(config: VMambaEncoderConfig) -> VMambaArchitecture:
    """Return the numbers of a config.

    Raises:
        UserError: an unknown name, or fields that are wrong or missing.
    """
    values = config.architecture
    if values is None:
        raise UserError(
            f"vision encoder 'vmamba' needs an 'architecture': one of {', '.join(ARCHITECTURES)}, "
            "or a mapping such as {depths: [2, 2, 2], dims: [32, 64, 128]}"
        )
    if isinstance(values, str):
        values = lookup("VMamba architecture", FILE_NAMES.get(values, values), ARCHITECTURES)
    a = config_from_mapping(VMambaArchitecture, values, "vision encoder 'vmamba': architecture")
    rank = 1 if a.step_rank is None else a.step_rank
    numbers = (*a.depths, *a.dims, a.state_dim, rank, a.patch_size)
    if not a.depths or len(a.depths) != len(a.dims) or min(numbers) < 1:
        raise UserError(
            "vision encoder 'vmamba': architecture needs as many depths as dims, all positive, "
            f"not depths {a.depths} and dims {a.dims} with {a}"
        )
    narrowest = min(a.dims)
    if int(a.ssm_ratio * narrowest) < 1 or (a.mlp_ratio and int(a.mlp_ratio * narrowest) < 1):
        raise UserError(
            f"vision encoder 'vmamba': ssm_ratio {a.ssm_ratio} and mlp_ratio {a.mlp_ratio} times "
            f"the width {narrowest} must be at least one channel; mlp_ratio 0 means no MLP"
        )
    if a.stem == "v2" and (a.patch_size < 4 or a.patch_size % 2 or a.dims[0] % 2):
        raise UserError(
            "vision encoder 'vmamba': stem 'v2' needs an even patch_size of 4 or more and an even "
            f"first width, not {a.patch_size} and {a.dims[0]}; stem 'v1' takes any"
        )
    return a


def check(config: VMambaEncoderConfig, a: VMambaArchitecture) -> None:
    """Refuse stages that do not exist, and pictures too small for the last one.

    Raises:
        UserError: in these cases.
    """
    count, lowest = len(a.depths), min(config.layers)
    if config.output == "joined" and count < 2:
        raise UserError("vision encoder 'vmamba': one stage cannot be joined; set join_stages off")
    if lowest < -count:
        raise UserError(
            f"vision encoder: layer {lowest} of {config.source or 'the architecture'} does not "
            f"exist; it has {count} stages, -{count} to -1"
        )
    size = config.image_size
    assert size is not None
    if min(min(shape) for shape in map_shapes(a, tuple(range(-count, 0)), (size, size))) < 1:
        raise UserError(
            f"vision encoder 'vmamba': image_size {size} is too small for {count} stages"
        )
