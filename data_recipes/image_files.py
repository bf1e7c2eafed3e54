"""Where is a picture's file: on the disk by itself, or inside the file that holds the records?

An `ImageFile` is a path, or an `Inside`: bytes of a parquet file or a tar that are read when they
are wanted. Only this file tells the two apart.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from vlm.images import image_size, load_image
from vlm.tiling import Size


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


ImageFile = str | Path | Inside


def locate(image: str | Inside, root: Path) -> ImageFile:
    """Return where a record's picture is; paths in records are relative to `root`."""
    return image if isinstance(image, Inside) else str(root / image)


def read(file: ImageFile) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        OSError: there is no such file.
        UserError: it is not where it should be inside another.
    """
    if isinstance(file, Inside):
        return file.container.read_picture(file.key)
    return Path(file).read_bytes()


def load(file: ImageFile) -> Image.Image:
    """Return the picture, upright and in RGB; raises UserError, as `load_image` does."""
    return load_image(read(file), name=str(file)) if isinstance(file, Inside) else load_image(file)


def size_of(file: ImageFile) -> Size:
    """Return the picture's (width, height) from its header; raises UserError."""
    return image_size(read(file), str(file)) if isinstance(file, Inside) else image_size(file)


def is_missing(file: ImageFile) -> bool:
    """Return whether a file of its own is not there; one inside another is not looked for."""
    return not isinstance(file, Inside) and not Path(file).is_file()
