"""Which uploaded files are taken, and what is kept of them? Pictures, drawn anew, and videos."""

import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from demo.limits import Limits
from demo.told import reason
from demo.wording import say
from vlm.chat_session import ChatSession, Medium
from vlm.errors import UserError
from vlm.images import load_image
from vlm.video import VideoLimits

# PIL reads many more, some by starting other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ogv", ".mpg", ".mpeg", ".ts", ".flv")
MAX_WORK_SECONDS = 30.0  # of finding and decoding a video's frames
LOSSLESS_PIXELS = 1_000_000  # a larger picture is kept as JPEG: its PNG would take seconds
LONGEST_JPEG = 65_500  # pixels of a side


def keep_file(
    source: Path, name: str, chat: ChatSession, folder: Path, limits: Limits, language: str
) -> tuple[str, Medium]:
    """Keep a picture or, if its name says so, a video; see `keep_picture` and `keep_video`.

    Raises:
        UserError: it cannot be taken.
    """
    if is_video_name(name):
        return keep_video(source, name, chat, folder, limits, language)
    return keep_picture(source, name, folder, limits, language)


def is_video_name(name: str) -> bool:
    """Tell whether a file is taken as a video, not as a picture."""
    return Path(name).suffix.lower() in VIDEOS


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
    pixels = _num_pixels(source)
    if pixels is None:
        raise UserError(say(language, "no_picture", name=name))
    if pixels > limits.max_pixels:
        limit = limits.max_megapixels
        raise UserError(say(language, "too_many_pixels", name=name, limit=limit))
    try:
        picture = load_image(source, max_pixels=limits.max_pixels)
    except UserError as error:
        raise UserError(say(language, "picture_damaged", name=name)) from error
    small = picture.width * picture.height <= LOSSLESS_PIXELS or max(picture.size) > LONGEST_JPEG
    path = folder / f"{secrets.token_hex(8)}.{'png' if small else 'jpg'}"
    with _whole_or_gone(path):  # of PNG this level is three times as fast, its files a bit larger
        picture.save(path, quality=95, compress_level=1)
    return str(path), picture if small else load_image(path)


def keep_video(
    source: Path, name: str, chat: ChatSession, folder: Path, limits: Limits, language: str
) -> tuple[str, Medium]:
    """Copy a video under a name of ours and decode the frames that the model looks at.

    The file stays as it was uploaded; only the visitor's own browser plays it.

    Returns:
        the path of the copy, and the frames.

    Raises:
        UserError: the file is too large, no video, damaged, or longer than the limits.
    """
    if source.stat().st_size > limits.max_file_bytes:
        raise UserError(say(language, "file_too_large", name=name, limit=limits.max_file_mb))
    path = folder / f"{secrets.token_hex(8)}{Path(name).suffix.lower()}"
    checks = VideoLimits(
        max_seconds=limits.max_video_seconds,
        max_pixels=limits.max_pixels,
        max_work_seconds=MAX_WORK_SECONDS,
    )
    try:
        with _whole_or_gone(path):
            shutil.copyfile(source, path)
            chat.add_video(path, limits=checks)
    except UserError as error:
        raise UserError(reason(error, language, path=name).replace(str(path), name)) from error
    return chat.waiting.pop()


@contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """Leave nothing of a file that could not be written, or is not wanted."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


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
