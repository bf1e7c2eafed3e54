"""How do features get into a folder of `feature_store`, so that a kill or a full disk hurts none?

What is added lies in this writer's own files. Feature maps reach the disk before the records that
name them are written.
"""

import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from data_recipes.feature_store import ENTRY, FILE, MARK, Layout, Picture, entry_key
from vlm.errors import UserError
from vlm.tiling import Size

FLUSH_BYTES = 64 << 20  # a writer that is killed loses this much at most
FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(Exception):
    """The features would take more than is allowed, or more than the disk has."""


class FeatureWriter:
    """Adds to a folder, as a context; files are made when the first thing is added.

    Args:
        folder: of a `FeatureStore`.
        layout: of the maps.
        budget: most bytes that may be written.
    """

    def __init__(self, folder: Path, layout: Layout, budget: int) -> None:
        self.folder = folder
        self.layout = layout
        self.budget = budget
        self._name = uuid.uuid4().hex
        self._streams: dict[str, BinaryIO] = {}
        self._open = ExitStack()
        self._records: dict[str, list[np.ndarray]] = {"entries": [], "files": []}
        self._offset = 0
        self._flushed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._told(), self._open:  # on a full disk a stream's close fails, too
            if kind is not NoRoomError:
                self.flush()

    def add(self, picture: Picture, grid: Size, maps: Sequence[Tensor]) -> None:
        """Store the maps (T, H, W, D) of a picture cut into (rows, cols).

        Raises:
            NoRoomError: they do not fit; what was flushed before stays.
            UserError: the folder cannot be written.
        """
        views = len(maps[0])
        raw = torch.zeros(self.layout.entry_bytes(views), dtype=torch.uint8)
        for (start, end), each in zip(self.layout.places(views), maps, strict=True):
            raw[start:end] = each.detach().cpu().reshape(-1).view(torch.uint8)
        record = _record(ENTRY, entry_key(picture, grid))
        record["offset"], record["views"] = self._offset, views
        self._charge(len(raw) + ENTRY.itemsize)
        self._write("features", raw.numpy().tobytes())
        self._records["entries"].append(record)
        self._offset += len(raw)
        if self._offset - self._flushed >= FLUSH_BYTES:
            self.flush()

    def note(self, state: bytes, picture: Picture) -> None:
        """Store which picture a file in this state holds, if it fits; it only saves reading it."""
        if self.budget < FILE.itemsize:
            return
        record = _record(FILE, state)
        record["picture"] = np.frombuffer(picture.content, "V16")
        record["width"], record["height"] = picture.size
        self._charge(FILE.itemsize)
        self._records["files"].append(record)

    def flush(self) -> None:
        """Bring the maps to the disk, then the records that name them.

        Raises:
            NoRoomError: the disk is full.
            UserError: the folder cannot be written.
        """
        self._sync("features")
        for name, records in self._records.items():
            if records:
                self._write(name, np.concatenate(records).tobytes())
                records.clear()
                self._sync(name)
        self._flushed = self._offset

    def _charge(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise NoRoomError

    def _write(self, name: str, data: bytes) -> None:
        with self._told():
            if name not in self._streams:
                path = self.folder / f"{self._name}.{name}"
                self._streams[name] = self._open.enter_context(path.open("xb"))
            self._streams[name].write(data)

    def _sync(self, name: str) -> None:
        if name in self._streams:
            with self._told():
                self._streams[name].flush()
                os.fsync(self._streams[name].fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn a full disk's error into NoRoomError, any other of the folder's into UserError."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise NoRoomError from error
            raise UserError(
                f"features cannot be written to {self.folder} ({error.strerror}); "
                "make it writable, or choose another feature_cache.folder"
            ) from error


def _record(kind: np.dtype, key: bytes) -> np.ndarray:
    """Return one record of a kind with its key and mark."""
    record = np.zeros(1, kind)
    record["key"], record["mark"] = np.frombuffer(key, "V16"), MARK
    return record
