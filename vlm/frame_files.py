"""How are pictures a video: those of a folder, in order, or a list of them, so many a second?

As the frames of LLaVA-Hound and ShareGPTVideo lie, a folder a video. Nobody wrote down how many a
second they are; LLaVA-NeXT's train.py takes 2.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.errors import UserError
from vlm.images import load_image
from vlm.video_file import Deadline, VideoLimits, check_count, check_seconds

FRAME_RATE = 2.0
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class FrameFiles:
    """Pictures that are a video's frames already.

    Attributes:
        files: in order; paths, or whatever `load` takes.
        rate: how many a second.
        name: what errors call the video.
        load: takes a file, `max_pixels` and `target_size`, as `vlm.images.load_image`.
    """

    files: tuple[Any, ...]
    rate: float
    name: str
    load: Callable[..., Image.Image] = load_image

    def __str__(self) -> str:
        return self.name

    def times(self, limits: VideoLimits) -> list[float]:
        """Return when each frame is shown, in seconds.

        Raises:
            UserError: there are none, or more than the limits allow.
        """
        if not self.files:
            raise UserError(f"video {self} holds no frame", "video_no_frame", path=self)
        check_count(self, len(self.files), limits)
        check_seconds(self, len(self.files) / self.rate, limits)
        return [number / self.rate for number in range(len(self.files))]

    def pictures(
        self, chosen: Sequence[int], target_size: int | None, limits: VideoLimits
    ) -> Iterator[Image.Image]:
        """Yield some frames, upright and in RGB, shrunk as `vlm.video.sample_video` says.

        Raises:
            UserError: one cannot be read, or the limits are exceeded.
        """
        deadline = Deadline(self, limits)
        for number in chosen:
            deadline.tick()
            image = self.load(
                self.files[number], max_pixels=limits.max_pixels, target_size=target_size
            )
            yield image if target_size is None else _shrunk(image, 2 * target_size)


def is_frame_name(name: str) -> bool:
    """Return whether a file is a picture by its name; a GIF is a video."""
    return Path(name).suffix.lower() in SUFFIXES


def frames_in(folder: str | Path) -> tuple[str, ...]:
    """Return the pictures of a folder, in the order of their names and of the numbers in these.

    Raises:
        UserError: there are none, or the folder cannot be read.
    """
    try:
        names = [path.name for path in Path(folder).iterdir() if is_frame_name(path.name)]
    except OSError as error:
        raise UserError(f"video {folder} cannot be read: {error.strerror}") from error
    names = sorted((name for name in names if not name.startswith(".")), key=_in_order)
    if not names:
        raise UserError(
            f"video {folder} is a folder without pictures; give a video file, or a folder of "
            f"frames ({', '.join(sorted(SUFFIXES))})"
        )
    return tuple(str(Path(folder) / name) for name in names)


def _in_order(name: str) -> tuple[list[Any], str]:
    """Return what sorts frame2 before frame10."""
    pieces = [int(piece) if piece.isdecimal() else piece for piece in _DIGITS.split(name)]
    return pieces, name


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return a picture whose shorter side is `side` at most."""
    scale = side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX)
