"""Which uploaded files are taken, and what is kept of them? Pictures, drawn anew."""

import secrets
import warnings
from pathlib import Path

from PIL import Image

from demo.limits import Limits
from demo.wording import say
from vlm.errors import UserError
from vlm.images import load_image

# PIL reads many more, some by starting other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LOSSLESS_PIXELS = 1_000_000  # a larger picture is kept as JPEG: its PNG would take seconds


def keep_picture(
    source: Path, name: str, folder: Path, limits: Limits, language: str
) -> tuple[str, Image.Image]:
    """Decode a picture and write it anew: what is shown, saved and seen by the model is one file.

    Metadata, scripts and whatever else a file can hold beside its pixels are left behind. Errors
    name the file as the visitor does, and no path of this machine.

    Returns:
        the path of the copy, and the picture.

    Raises:
        UserError: the file is too large, has too many pixels, or is no picture.
    """
    if source.stat().st_size > limits.max_file_bytes:
        raise UserError(say(language, "file_too_large", name=name, limit=limits.max_file_mb))
    no_picture = UserError(say(language, "no_picture", name=name))
    pixels = _num_pixels(source)
    if pixels is None:
        raise no_picture
    if pixels > limits.max_pixels:
        limit = limits.max_megapixels
        raise UserError(say(language, "too_many_pixels", name=name, limit=limit))
    try:
        picture = load_image(source, max_pixels=limits.max_pixels)
    except UserError as error:
        raise no_picture from error
    small = picture.width * picture.height <= LOSSLESS_PIXELS
    path = folder / f"{secrets.token_hex(8)}.{'png' if small else 'jpg'}"
    picture.save(path, quality=95)
    return str(path), picture if small else load_image(path)


def _num_pixels(source: Path) -> float | None:
    """Return width * height from the header alone; None: no picture of a format that is taken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as picture:
                return picture.width * picture.height
    except Image.DecompressionBombError:
        return float("inf")
    except (OSError, SyntaxError, ValueError, EOFError):
        return None
