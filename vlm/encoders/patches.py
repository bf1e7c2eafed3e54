"""What does a language model see without an encoder? The pixels of each patch, as Fuyu does.

Shapes: T views, S image size, H W patch grid, p patch size, D = p * p * 3.

Surprise: a patch's values stand in the order (row, column, colour), as in the reference's
`patchify_image`; a convolution's weights stand in the order (colour, row, column).

Follows `image_processing_fuyu.py` of transformers (patchify_image).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from vlm.encoders.base import EncoderConfig, VisionEncoder, fill
from vlm.errors import UserError

# Fuyu's: up to 1080 x 1920 pixels in patches of 30; square views need a size of their own.
DEFAULTS = {"image_size": 480, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True, kw_only=True)
class PatchesEncoderConfig(EncoderConfig):
    """How the view is cut; there is nothing to load, so `source` stays away."""

    patch_size: int = 30  # p

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1:
            raise UserError(
                f"vision encoder 'patches': patch_size must be positive, not {self.patch_size}"
            )
        if self.layer != "last":
            raise UserError("vision encoder 'patches' has no layers: leave layer away")


class PatchesEncoder(VisionEncoder[PatchesEncoderConfig]):
    """Cuts views into patches; nothing is learned."""

    type_name = "patches"
    needs_source = False  # there are no weights to load
    config_class = PatchesEncoderConfig

    def __init__(self, config: PatchesEncoderConfig) -> None:
        super().__init__(config)
        self.patch_size = config.patch_size
        self.settle(config)

    @classmethod
    def resolve(cls, config: PatchesEncoderConfig) -> PatchesEncoderConfig:
        """Return the config with size, mean and std.

        Raises:
            UserError: the patch size does not divide the image size.
        """
        config = fill(config, DEFAULTS)
        assert config.image_size is not None
        if config.image_size % config.patch_size:
            raise UserError(
                f"vision encoder 'patches': patch_size {config.patch_size} does not divide "
                f"image_size {config.image_size}; choose another of the two"
            )
        return config

    @classmethod
    def load(cls, config: PatchesEncoderConfig, dtype: torch.dtype) -> Self:
        """Return the encoder; it has no weights, so `dtype` changes nothing."""
        return cls(cls.resolve(config))

    @property
    def dtype(self) -> torch.dtype:
        """Return the type pictures are cast to."""
        return torch.get_default_dtype()

    def extract(self, pixel_values: Tensor) -> tuple[Tensor]:
        """Return the patches (T, H, W, p * p * 3) of pictures (T, 3, S, S)."""
        p = self.patch_size
        patches = pixel_values.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (T, 3, H, p, W, p)
        return (patches.permute(0, 2, 4, 3, 5, 1).flatten(3),)

    def save_weights(self, folder: Path) -> None:
        """Write nothing: `vision_encoder.json` says it all."""
