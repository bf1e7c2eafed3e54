"""Where does each record of a JSON array or JSONL file start? One pass over bytes, by chunks.

Nothing is decoded: a chunk is looked at through numpy, so a file of any size takes the memory of
one chunk plus 8 bytes a record. In a JSON array a record is an object at depth one; quotes and
escapes are respected, also where a chunk border cuts them.
"""

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vlm.errors import UserError

CHUNK_BYTES = 1 << 22
BOM = b"\xef\xbb\xbf"

QUOTE, BACKSLASH, COMMA = (ord(c) for c in '"\\,')
STEPS = np.zeros(256, dtype=np.int8)  # what a byte outside strings does to the depth
STEPS[list(b"[{")] = 1
STEPS[list(b"]}")] = -1
MARKS = STEPS != 0
MARKS[[QUOTE, BACKSLASH, COMMA]] = True


@dataclass(frozen=True)
class Scan:
    """Where the records are.

    Attributes:
        offsets: (num_records + 1,) uint64; record i lies in [offsets[i], offsets[i + 1]).
        one_per_line: record i stands on line i + 1, so that no line need be counted.
    """

    offsets: np.ndarray
    one_per_line: bool


def scan(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Scan:
    """Find every record of `path`; an array if its first visible byte is `[`, JSONL otherwise.

    Raises:
        UserError: the file is empty, or the array is cut short or holds more than objects.
    """
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        first = b""
        while not first:
            block = file.read(1 << 16)
            if not block:
                raise UserError(f"{path}: the file holds no record")
            first = block.lstrip()[:1]
        file.seek(start)
        if first == b"[":
            return _scan_array(file, path, start, chunk_bytes)
        return _scan_lines(file, start)


def _scan_lines(file: BinaryIO, start: int) -> Scan:
    """Offsets of the lines that hold more than white space."""
    starts = array("Q")
    position, num_lines = start, 0
    for line in file:
        num_lines += 1
        if not line.isspace():  # looks at one byte of an ordinary line
            starts.append(position)
        position += len(line)
    starts.append(position)
    offsets = np.frombuffer(starts, dtype=np.uint64)
    return Scan(offsets=offsets, one_per_line=len(starts) - 1 == num_lines)


def _scan_array(file: BinaryIO, path: Path, start: int, chunk_bytes: int) -> Scan:
    """Offsets of the objects at depth one of a JSON array."""
    parts: list[np.ndarray] = []
    depth, in_string, escaped, commas, position = 0, False, False, 0, start
    while block := file.read(chunk_bytes):
        data = np.frombuffer(block, dtype=np.uint8)
        marks = np.flatnonzero(MARKS[data])
        marks, escaped = _drop_escaped(data, marks, escaped)
        quotes = data[marks] == QUOTE
        inside = (np.cumsum(quotes) + in_string) % 2 == 1
        outside = marks[~inside & ~quotes]
        kinds = data[outside]
        depths = depth + np.cumsum(STEPS[kinds], dtype=np.int64)
        parts.append((position + outside[(kinds == ord("{")) & (depths == 2)]).astype(np.uint64))
        commas += int(((kinds == COMMA) & (depths == 1)).sum())
        in_string = bool((quotes.sum() + in_string) % 2)
        depth = int(depths[-1]) if depths.size else depth
        position += len(block)
    starts = np.concatenate(parts)
    if depth != 0 or in_string:
        raise UserError(f"{path}: the JSON array does not end; the file may be cut short")
    if starts.size == 0 and commas == 0:
        raise UserError(f"{path}: the JSON array holds no record")
    if commas != starts.size - 1:
        raise UserError(
            f"{path}: the JSON array must hold records, one comma between two; "
            f"it has {starts.size} object(s) and {commas} comma(s) between its elements"
        )
    return Scan(offsets=np.append(starts, np.uint64(position)), one_per_line=False)


def _drop_escaped(data: np.ndarray, marks: np.ndarray, escaped: bool) -> tuple[np.ndarray, bool]:
    """Remove backslashes and the marks they escape.

    Args:
        data: (chunk,) bytes; marks: (marks,) positions in it, in order.
        escaped: the chunk's first byte is escaped by the chunk before.

    Returns:
        The marks left, and whether the next chunk's first byte is escaped.
    """
    slashes = marks[data[marks] == BACKSLASH]
    if slashes.size == 0:
        return (marks[marks != 0] if escaped else marks), False
    if escaped and slashes[0] == 0:
        slashes = slashes[1:]  # itself escaped, so it starts no run
    starts = slashes[np.diff(slashes, prepend=-2) != 1]
    ends = slashes[np.diff(slashes, append=data.size + 1) != 1]
    hit = ends[(ends - starts) % 2 == 0] + 1  # an odd run escapes the byte after it
    escapes_next = bool(hit.size) and int(hit[-1]) == data.size
    keep = np.ones(data.size + 1, dtype=bool)
    keep[hit] = False
    keep[0] &= not escaped
    marks = marks[keep[marks]]
    return marks[data[marks] != BACKSLASH], escapes_next
