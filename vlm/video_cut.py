"""Does a video file end before the place where its own header says that it ends?

Durations in headers do not answer it: they cover sound, leave out how long the last frame stays,
and are wrong in many sound files. Sizes are what players need to find their way. MPEG and FLV have
none, nor have files that were written while they were sent.
"""

from typing import IO

LOST = 0.05  # of the file: from here on it is cut; some programs miscount by a few bytes
MOST_BOXES = 100_000  # that are looked at: a long MP4 of fragments has tens of thousands


def is_cut(file: IO[bytes]) -> bool:
    """Return whether a file lacks more than `LOST` of the bytes that it says to have.

    Args:
        file: seekable; it is left at its beginning.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"\x1a\x45\xdf\xa3":
        told = _matroska_end(file)
    elif start[:4] == b"RIFF" and start[8:] == b"AVI ":
        told = 8 + int.from_bytes(start[4:8], "little")
    elif start[4:8] == b"ftyp":
        told = _data_end(file, size)
    else:
        told = None
    file.seek(0)
    return told is not None and told - size > LOST * told


def _matroska_end(file: IO[bytes]) -> int | None:
    """Return where the segment ends; None: it does not say."""
    file.seek(4)
    header = _length(file)
    if header is None:
        return None
    file.seek(header, 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    segment = _length(file)
    return None if segment is None else file.tell() + segment


def _length(file: IO[bytes]) -> int | None:
    """Read a length as Matroska writes it; None: unknown (all bits set), or none."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more), "big") & ((1 << 7 * (more + 1)) - 1)
    return None if value == (1 << 7 * (more + 1)) - 1 else value


def _data_end(file: IO[bytes], size: int) -> int | None:
    """Return where the data of an MP4 end that reach beyond the file; None: none do."""
    at = 0
    for _ in range(MOST_BOXES):
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if len(head) < 8 or length < 8:  # 0: as far as the file goes
            return None
        at += length
        if at > size:
            return at if kind == b"mdat" else None
    return None
