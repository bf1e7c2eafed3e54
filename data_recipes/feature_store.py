"""How are an encoder's feature maps kept on disk, for any number of writers and readers at once?

A folder holds the features of one encoder and one way of cutting pictures. Every writer has files
of its own and nothing is ever changed, so there are no locks:

    <writer>.features   feature maps, each from a multiple of 64 bytes on
    <writer>.entries    32 bytes each: a picture and its grid -> where its maps begin
    <writer>.files      48 bytes each: a file's state -> the picture in it, its width and height

A record is written when what it speaks of is on the disk. So what a killed writer left half done is
a record with too few bytes or maps that no record names, and both are passed over. A picture is
known by the hash of its file's bytes; a file whose state (path, size, times, inode) is known is not
read again to find it.

Shapes: T views, H W feature grid, D encoder width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_recipes.image_files import MediaFile, read, shown_size, state
from vlm.errors import UserError
from vlm.tiling import Size
from vlm.video_times import Shown, ShownVideo

KEY_BYTES = 16
MARK = 0x766C6D31  # what a crash leaves may be zeros; a record has this
ENTRY = np.dtype([("key", "V16"), ("offset", "<u8"), ("views", "<u4"), ("mark", "<u4")])
FILE = np.dtype(
    [("key", "V16"), ("picture", "V16"), ("width", "<u4"), ("height", "<u4"), ("mark", "<u8")]
)
ALIGNMENT = 64


class LostFeaturesError(UserError):
    """What was stored before the first step is gone; no fault of a record, so none is skipped."""


@dataclass(frozen=True)
class Picture:
    """A picture as its file holds it: the hash of the bytes, and (width, height) upright.

    A video's size is (0, frames).
    """

    content: bytes
    size: Size


def as_size(shown: Shown) -> Size:
    """Return what a picture or a video has as its size."""
    return (0, shown.num_frames) if isinstance(shown, ShownVideo) else shown


@dataclass(frozen=True)
class Layout:
    """What an encoder's maps of one view are: (H, W, D) of each, and its type."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def places(self, views: int) -> Iterator[tuple[int, int]]:
        """Yield where each map of so many views begins and ends in an entry, in bytes."""
        start = 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = start + views * int(np.prod(shape)) * dtype.itemsize
            yield start, end
            start = -(-end // ALIGNMENT) * ALIGNMENT

    def entry_bytes(self, views: int) -> int:
        """Return how many bytes the maps of so many views take."""
        *_, (_, end) = self.places(views)
        return -(-end // ALIGNMENT) * ALIGNMENT

    def read(self, raw: Tensor, views: int) -> list[Tensor]:
        """Return the maps (T, H, W, D) of an entry's bytes, without a copy."""
        return [
            raw[start:end].view(dtype).view(views, *shape)
            for (start, end), shape, dtype in zip(
                self.places(views), self.shapes, self.dtypes, strict=True
            )
        ]

    def empty(self) -> list[Tensor]:
        """Return the maps (0, H, W, D) of no view."""
        return [
            torch.empty(0, *shape, dtype=dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]


def content_of(data: bytes) -> bytes:
    """Return what a picture with these bytes is known by."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def state_of(file: MediaFile) -> bytes:
    """Return a key that changes when a file is written, replaced or moved; its bytes are not read.

    Raises:
        OSError: there is no such file.
    """
    path, *rest = state(file)
    return content_of(f"{path}\0{tuple(rest)}".encode())


def entry_key(picture: Picture, grid: Size) -> bytes:
    """Return the key of a picture cut into (rows, cols)."""
    return content_of(picture.content + f"{grid}".encode())


class FeatureStore:
    """Reads what was in the folder when this was made.

    No file stays open and none is mapped: a folder may have thousands of them, and one may be
    larger than the memory that the system lends to a map.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self._writers: list[Path] = []
        entries, writers = [np.zeros(0, ENTRY)], [np.zeros(0, np.int64)]
        files = [np.zeros(0, FILE)]
        for path in sorted(folder.glob("*.entries")):
            entries.append(self._whole_entries(path))
            writers.append(np.full(len(entries[-1]), len(self._writers)))
            self._writers.append(path.with_suffix(".features"))
        files += [_records(path, FILE) for path in sorted(folder.glob("*.files"))]
        self._entries = _Table(np.concatenate(entries))
        self._writer_of = np.concatenate(writers)[self._entries.order]
        self._files = _Table(np.concatenate(files))

    def __len__(self) -> int:
        """Number of entries; a picture that was stored twice counts twice."""
        return len(self._entries.rows)

    def _whole_entries(self, path: Path) -> np.ndarray:
        """Return a writer's records, without those that reach beyond its features."""
        records, features = _records(path, ENTRY), path.with_suffix(".features")
        size = features.stat().st_size if features.exists() else 0
        views, numbers = np.unique(records["views"], return_inverse=True)
        lengths = [self.layout.entry_bytes(count) for count in views.tolist()]
        return records[records["offset"] + np.array(lengths, np.uint64)[numbers] <= size]

    def known(self, file: MediaFile) -> Picture | None:
        """Return the picture of a file whose state is known, without reading the file.

        Raises:
            OSError: there is no such file.
        """
        place = self._files.find(state_of(file))
        if place is None:
            return None
        row = self._files.rows[place]
        return Picture(row["picture"].tobytes(), (int(row["width"]), int(row["height"])))

    def identify(self, file: MediaFile) -> Picture:
        """Return the picture of a file; its bytes are read where its state is not known.

        Raises:
            OSError: there is no such file.
            UserError: it is no picture.
        """
        known = self.known(file)
        return known or Picture(content_of(read(file)), as_size(shown_size(file)))

    def has(self, picture: Picture, grid: Size) -> bool:
        """Return whether the features of a picture cut into (rows, cols) are here."""
        return self._entries.find(entry_key(picture, grid)) is not None

    def features(self, picture: Picture, grid: Size) -> list[Tensor] | None:
        """Return the maps (T, H, W, D) of a picture cut into (rows, cols).

        Raises:
            LostFeaturesError: they were deleted after this was made.
        """
        place = self._entries.find(entry_key(picture, grid))
        if place is None:
            return None
        row, path = self._entries.rows[place], self._writers[self._writer_of[place]]
        offset, views = int(row["offset"]), int(row["views"])
        length = self.layout.entry_bytes(views)
        try:
            raw = np.fromfile(path, np.uint8, length, offset=offset)
        except FileNotFoundError:
            raw = np.zeros(0, np.uint8)
        if len(raw) < length:
            raise LostFeaturesError(
                f"{path}: stored features were deleted while they were in use; "
                "the same command stores them again and goes on"
            )
        return self.layout.read(torch.from_numpy(raw), views)


class _Table:
    """Records in the order of their keys."""

    def __init__(self, records: np.ndarray) -> None:
        self.order = np.argsort(records["key"], kind="stable")
        self.rows = records[self.order]
        self._keys = np.ascontiguousarray(self.rows["key"])

    def find(self, key: bytes) -> int | None:
        """Return the place of the first record with this key."""
        place = int(np.searchsorted(self._keys, np.frombuffer(key, self._keys.dtype))[0])
        found = place < len(self._keys) and self._keys[place].tobytes() == key
        return place if found else None


def _records(path: Path, kind: np.dtype) -> np.ndarray:
    """Return the records of a file; of one that was cut short, the whole ones."""
    data = path.read_bytes()
    found = np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)
    return found[found["mark"] == MARK]
