"""Where is a picture's file: on the disk by itself, or inside the file that holds the records?

An `ImageFile` is a path, or an `Inside`: bytes of a parquet file or a tar that are read when they
are wanted. A `VideoFile` is a path and which frames are looked at. Only this file tells them apart.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlm.images import image_size, load_image
from vlm.tiling import Size
from vlm.video import SampledVideo, sample_video, video_facts
from vlm.video_layout import VideoConfig
from vlm.video_times import Shown, ShownVideo, shown_video


class Container(Protocol):
    """A file with pictures in it; what a key means is its own affair."""

    def read_picture(self, key: tuple[int, int]) -> bytes:
        """Return the bytes of one picture's file.

        Raises:
            UserError: they are not there.
        """
        ...

    def name_picture(self, key: tuple[int, int]) -> str:
        """Return what errors call a picture."""
        ...


@dataclass(frozen=True)
class Inside:
    """A picture inside another file; equal if file and key are.

    Attributes:
        path: the other file.
        key: which picture of it.
        container: reads it.
    """

    path: str
    key: tuple[int, int]
    container: Container = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.container.name_picture(self.key)


@dataclass(frozen=True)
class VideoFile:
    """A video as a model looks at it.

    Attributes:
        path: its file.
        config: which frames of it; how their tokens are laid out plays no part here.
        target_size: of the views that its frames become.
    """

    path: str
    config: VideoConfig
    target_size: int

    def __str__(self) -> str:
        return self.path

    def shown(self) -> ShownVideo:
        """Return what counts its tokens, without decoding a frame; raises UserError."""
        return shown_video(video_facts(self.path, **self.sampling), self.config)

    def frames(self) -> SampledVideo:
        """Return them, decoded; raises UserError."""
        return sample_video(self.path, **self.sampling, target_size=self.target_size)

    @property
    def sampling(self) -> dict[str, Any]:
        """Which frames, as `sample_video` takes it."""
        return self.config.sampling()


ImageFile = str | Path | Inside
MediaFile = ImageFile | VideoFile


def locate(image: str | Inside, root: Path) -> ImageFile:
    """Return where a record's picture is; paths in records are relative to `root`."""
    return image if isinstance(image, Inside) else str(root / image)


def read(file: MediaFile) -> bytes:
    """Return the bytes of a picture's file; of a video's, which may be large, a hash of both.

    Both are the file and which frames of it are looked at.

    Raises:
        OSError: there is no such file.
        UserError: it is not where it should be inside another.
    """
    if isinstance(file, Inside):
        return file.container.read_picture(file.key)
    if isinstance(file, VideoFile):
        with Path(file.path).open("rb") as opened:
            digest = hashlib.file_digest(opened, "blake2b")
        digest.update(repr(sorted(file.sampling.items())).encode())
        return digest.digest()
    return Path(file).read_bytes()


def state(file: MediaFile) -> tuple[Any, ...]:
    """Return what changes when a file is written, replaced or moved; its bytes are not read.

    Raises:
        OSError: there is no such file.
    """
    path = file.path if isinstance(file, (Inside, VideoFile)) else file
    status = os.stat(path)
    found = (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if isinstance(file, VideoFile):
        return (*found, status.st_ino, *sorted(file.sampling.items()))
    return (*found, status.st_ino, *(file.key if isinstance(file, Inside) else ()))


def load_media(file: MediaFile) -> Image.Image | SampledVideo:
    """Return the picture, or the video's frames; raises UserError."""
    return file.frames() if isinstance(file, VideoFile) else load(file)


def shown_size(file: MediaFile) -> Shown:
    """Return what counts the tokens of a picture or a video; nothing is decoded.

    Raises:
        UserError: it cannot be read.
    """
    return file.shown() if isinstance(file, VideoFile) else size_of(file)


def load(file: ImageFile) -> Image.Image:
    """Return the picture, upright and in RGB; raises UserError, as `load_image` does."""
    return load_image(read(file), name=str(file)) if isinstance(file, Inside) else load_image(file)


def size_of(file: ImageFile) -> Size:
    """Return the picture's (width, height) from its header; raises UserError."""
    return image_size(read(file), str(file)) if isinstance(file, Inside) else image_size(file)


def is_missing(file: MediaFile) -> bool:
    """Return whether a file of its own is not there; one inside another is not looked for."""
    if isinstance(file, VideoFile):
        return not Path(file.path).is_file()
    return not isinstance(file, Inside) and not Path(file).is_file()
