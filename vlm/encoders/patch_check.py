"""Do the layers asked for exist, and do patches fill the picture? Of encoders that cut patches."""

from typing import Protocol

from vlm.encoders.base import EncoderConfig
from vlm.errors import UserError


class Patches(Protocol):
    """The numbers of an architecture that say how pictures are cut, and how deep it is."""

    @property
    def depth(self) -> int:
        """Blocks."""
        ...

    @property
    def patch_size(self) -> int:
        """Pixels."""
        ...

    @property
    def stride(self) -> int | None:
        """Pixels between patches."""
        ...


def check_patches(type_name: str, config: EncoderConfig, a: Patches) -> None:
    """Refuse layers that do not exist, and sizes whose last pixels no patch would see.

    Raises:
        UserError: in these cases, and for a picture smaller than a patch.
    """
    if min(config.layers) < -a.depth:
        raise UserError(
            f"vision encoder: layer {min(config.layers)} of {config.source or 'the architecture'} "
            f"does not exist; it has {a.depth} layers, -{a.depth} to -1"
        )
    size = config.image_size
    assert size is not None and a.stride is not None
    if size < a.patch_size or (size - a.patch_size) % a.stride:
        fits = a.patch_size + max(0, (size - a.patch_size) // a.stride) * a.stride
        raise UserError(
            f"vision encoder {type_name!r}: patches of {a.patch_size} pixels every {a.stride} do "
            f"not fill image_size {size}; {fits} and {fits + a.stride} would do"
        )
