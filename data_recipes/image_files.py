"""Where is a picture's file: on the disk by itself, or inside the file that holds the records?

An `ImageFile` is a path, or an `Inside`: bytes of a parquet file or a tar that are read when they
are wanted. A `VideoFile` is one of these, a folder of frames or a row of pictures, and which frames
are looked at. Only this file tells them apart.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlm.frame_files import FRAME_RATE, FrameFiles, frames_in
from vlm.images import MAX_PIXELS, image_size, load_image
from vlm.tiling import Size
from vlm.video import SampledVideo, VideoSource, sample_video, video_facts, with_frames
from vlm.video_file import VideoBytes
from vlm.video_layout import VideoConfig
from vlm.video_times import Shown, ShownVideo, shown_video


class Container(Protocol):
    """A file with pictures or videos in it; what a key means is its own affair."""

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
    """A picture or a video inside another file; equal if file and key are.

    Attributes:
        path: the other file.
        key: which of it.
        container: reads it.
        name: its own name there, if it has one.
    """

    path: str
    key: tuple[int, int]
    container: Container = field(compare=False, repr=False)
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.container.name_picture(self.key)


@dataclass(frozen=True)
class VideoFile:
    """A video as a model looks at it.

    Attributes:
        place: its file, a folder of its frames, or these, pictures in order.
        config: which frames of it; how their tokens are laid out plays no part here.
        target_size: of the views that its frames become.
        frame_rate: frames a second, where they are pictures.
    """

    place: str | Inside | tuple[str | Inside, ...]
    config: VideoConfig
    target_size: int
    frame_rate: float = FRAME_RATE

    def __str__(self) -> str:
        if isinstance(self.place, tuple):
            return f"{self.place[0]} and {len(self.place) - 1} more"
        return str(self.place)

    def source(self) -> VideoSource:
        """Return what is read; raises UserError."""
        if isinstance(self.place, tuple):
            return FrameFiles(self.place, self.frame_rate, str(self), load)
        if isinstance(self.place, Inside):
            return VideoBytes(read(self.place), str(self))
        return with_frames(self.place, self.frame_rate)

    def parts(self) -> tuple[str | Inside, ...]:
        """Return the files that it is made of; raises UserError."""
        if isinstance(self.place, tuple):
            return self.place
        folder = isinstance(self.place, str) and Path(self.place).is_dir()
        return frames_in(str(self.place)) if folder else (self.place,)

    def shown(self) -> ShownVideo:
        """Return what counts its tokens, without decoding a frame; raises UserError."""
        return shown_video(video_facts(self.source(), **self.sampling), self.config)

    def frames(self) -> SampledVideo:
        """Return them, decoded; raises UserError."""
        return sample_video(self.source(), **self.sampling, target_size=self.target_size)

    @property
    def sampling(self) -> dict[str, Any]:
        """Which frames, as `sample_video` takes it."""
        return self.config.sampling()

    @property
    def look(self) -> list[tuple[str, Any]]:
        """What decides which frames are looked at, beside the files."""
        is_file = isinstance(self.place, Inside) or not (
            isinstance(self.place, tuple) or Path(self.place).is_dir()
        )
        rate = [] if is_file else [("frame_rate", self.frame_rate)]
        return sorted(self.sampling.items()) + rate


ImageFile = str | Path | Inside
MediaFile = ImageFile | VideoFile
VideoPlace = str | Inside | tuple[str | Inside, ...]


def locate(image: str | Inside, root: Path) -> str | Inside:
    """Return where a record's picture is; paths in records are relative to `root`."""
    return image if isinstance(image, Inside) else str(root / image)


def locate_video(video: VideoPlace, root: Path) -> VideoPlace:
    """Return where a record's video is, or its frames are; see `locate`."""
    if isinstance(video, tuple):
        return tuple(locate(frame, root) for frame in video)
    return locate(video, root)


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
        digest = hashlib.blake2b()
        for part in file.parts():
            if isinstance(part, Inside):
                digest.update(read(part))
                continue
            with Path(part).open("rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
        digest.update(repr(file.look).encode())
        return digest.digest()
    return Path(file).read_bytes()


def state(file: MediaFile) -> tuple[Any, ...]:
    """Return what changes when a file is written, replaced or moved; its bytes are not read.

    Raises:
        OSError: there is no such file.
    """
    if isinstance(file, VideoFile):
        return (*(each for part in file.parts() for each in state(part)), *file.look)
    path = file.path if isinstance(file, Inside) else file
    status = os.stat(path)
    found = (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
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


def load(
    file: ImageFile, max_pixels: int = MAX_PIXELS, target_size: int | None = None
) -> Image.Image:
    """Return the picture, upright and in RGB; see `load_image`, whose errors it raises."""
    data = read(file) if isinstance(file, Inside) else file
    return load_image(data, max_pixels, target_size, name=str(file))


def size_of(file: ImageFile) -> Size:
    """Return the picture's (width, height) from its header; raises UserError."""
    return image_size(read(file), str(file)) if isinstance(file, Inside) else image_size(file)


def missing(file: MediaFile) -> str | None:
    """Return a file of its own that is not there; None: all are.

    One inside another is not looked for.
    """
    if isinstance(file, VideoFile) and isinstance(file.place, tuple):
        return next(filter(None, map(missing, file.place)), None)
    place = file.place if isinstance(file, VideoFile) else file
    if isinstance(place, (Inside, tuple)):
        return None
    is_there = Path(place).exists() if isinstance(file, VideoFile) else Path(place).is_file()
    return None if is_there else str(place)
