"""How is record i of a file of millions read without holding any? Byte offsets and a memory map.

The offsets (8 bytes a record) are found once and kept beside the data file, or in the user's cache
folder where the data's folder cannot be written, or in memory where neither can. They are rebuilt
when the file's size, time of change, first or last bytes differ. The index is written under a name
of its own and moved into place, so that processes that build it at once do not disturb each other.
"""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_recipes.scan import Scan, scan
from vlm.errors import UserError

MAGIC = b"vlmidx1\n"
HEADER_BYTES = 64  # magic 8, digest 32, number of offsets 8, one_per_line 1, room
SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Place:
    """A record's file and line, turned into text only when somebody asks."""

    where: Callable[[int], str]
    row: int

    def __str__(self) -> str:
        return self.where(self.row)


class RecordIndex:
    """Random access to the records of a JSON array or JSONL file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise UserError(f"{self.path}: the file is empty")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        found = load_or_build(self.path, scan)
        self._offsets, self._one_per_line = found.offsets, found.one_per_line

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Any:
        """Return the decoded record `row`.

        Raises:
            UserError: its text is no JSON; the sentence names file and line.
        """
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        try:
            text = self._bytes[start:end].decode("utf-8")
            value, stop = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(row)}: broken JSON ({error})") from error
        if rest := text[stop:].strip().rstrip(",]").strip():
            raise UserError(
                f"{self.where(row)}: broken JSON (text after the record: {rest[:40]!r})"
            )
        return value

    def __reduce__(self) -> tuple:
        """Reopen in another process: a memory map cannot be pickled."""
        return RecordIndex, (self.path,)

    def where(self, row: int) -> str:
        """Return "file:line" of record `row`; counts lines only where that is needed."""
        if self._one_per_line:
            return f"{self.path}:{row + 1}"
        start, line = int(self._offsets[row]), 1
        for position in range(0, start, SAMPLE_BYTES):
            line += self._bytes[position : min(position + SAMPLE_BYTES, start)].count(b"\n")
        return f"{self.path}:{line}"

    def place(self, row: int) -> Place:
        """Return `where(row)` as an object that computes its text late."""
        return Place(self.where, row)


_DECODER = json.JSONDecoder()


def load_or_build(path: Path, scan_file: Callable[[Path], Scan]) -> Scan:
    """Return the offsets of `path`, from the first cache that has them, else from a scan."""
    digest = fingerprint(path)
    candidates = cache_places(path, "index")
    for candidate in candidates:
        if (known := _read(candidate, digest)) is not None:
            return known
    found = scan_file(path)
    for candidate in candidates:
        if _write(candidate, digest, found):
            break
    return found


def fingerprint(path: Path) -> bytes:
    """Return 32 bytes that change when the file does: size, time, first and last 64 KiB."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, status.st_size - SAMPLE_BYTES))
        digest.update(file.read())
    return digest.digest()


def cache_places(path: Path, kind: str) -> list[Path]:
    """Return where what is known of a data file is kept: beside it, else in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    there = root / "vlm-suite" / "index" / f"{name}-{path.name}.{kind}"
    return [path.with_name(f".{path.name}.{kind}"), there]


def _read(cache: Path, digest: bytes) -> Scan | None:
    """Return the cached offsets, or None where there are none for this state of the file."""
    try:
        with cache.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError:
        return None
    count, size = int.from_bytes(header[40:48], "little"), cache.stat().st_size
    if header[:40] != MAGIC + digest or count < 2 or size != HEADER_BYTES + 8 * count:
        return None
    offsets = np.memmap(cache, dtype=np.uint64, mode="r", offset=HEADER_BYTES)
    return Scan(offsets=offsets, one_per_line=header[48] == 1)


def _write(cache: Path, digest: bytes, found: Scan) -> bool:
    """Write the offsets; False where the folder cannot be written (full, read-only, forbidden)."""
    count = len(found.offsets).to_bytes(8, "little")
    header = (MAGIC + digest + count + bytes([found.one_per_line])).ljust(HEADER_BYTES, b"\0")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, prefix=cache.name, delete=False) as file:
            try:
                file.write(header)
                file.write(found.offsets.astype("<u8").tobytes())
                file.flush()
                os.replace(file.name, cache)
            except OSError:
                os.unlink(file.name)
                return False
    except OSError:
        return False
    return True
