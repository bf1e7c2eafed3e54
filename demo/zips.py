"""Is a visitor's zip small enough to be read, whatever it tells of itself?"""

import lzma
import struct
import zipfile
import zlib
from pathlib import Path

from demo.limits import Limits
from demo.wording import say
from vlm.errors import UserError

MAX_ENTRIES = 200  # of a zip
MAX_DIRECTORY = MAX_ENTRIES * 300  # bytes of a zip's list of entries, with names of some length
MAX_RATIO = 50  # times as large as the zip; pictures and videos hardly shrink, text some 10 times
# What zipfile raises on a zip that is damaged, has a password, or is packed in an unknown way.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,  # of an unknown compression
    RuntimeError,  # of a password
)


def check_directory(source: Path, language: str) -> None:
    """Refuse a zip whose list of entries is long, before it is read: each takes a kilobyte then.

    The last record of a zip tells how long the list is (PKWARE's APPNOTE, 4.3.16); one for longer
    lists than a conversation has may stand before it (4.3.15).

    Raises:
        UserError: it is too long, or there is no such record.
    """
    with source.open("rb") as file:
        file.seek(max(0, source.stat().st_size - 66_000))
        end = file.read()
    place = end.rfind(b"PK\x05\x06")
    if place < 0 or len(end) < place + 22:
        raise UserError(say(language, "no_conversation"))
    (length,) = struct.unpack_from("<L", end, place + 12)
    if length > MAX_DIRECTORY or end[max(0, place - 20) : place].startswith(b"PK\x06\x07"):
        raise UserError(say(language, "too_many_in_zip", limit=MAX_ENTRIES))


def check_sizes(
    archive: zipfile.ZipFile, size: int, limits: Limits, most_text: int, language: str
) -> None:
    """Refuse a zip of so many bytes that holds too many entries, or too much of them.

    What an entry tells of its size may be untrue; `member` reads no more than it may.

    Raises:
        UserError: it does.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise UserError(say(language, "too_many_in_zip", limit=MAX_ENTRIES))
    most = min(limits.max_upload_bytes, most_text + MAX_RATIO * size)
    if sum(entry.file_size for entry in entries) > most:
        raise UserError(say(language, "zip_too_large", limit=most // 1_000_000))


def member(archive: zipfile.ZipFile, name: str, most: int, language: str) -> bytes:
    """Return a file of a zip, which may lie about its size.

    Raises:
        UserError: it is not there, or larger than `most` bytes.
    """
    try:
        with archive.open(name) as file:
            data = file.read(most + 1)
    except KeyError as error:
        raise UserError(say(language, "missing_in_zip", name=name)) from error
    if len(data) > most:
        raise UserError(say(language, "file_too_large", name=name, limit=most // 1_000_000))
    return data
