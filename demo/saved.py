"""How is a conversation kept in one file that `vlm train` reads when it is unpacked?

    conversation.json     one record in LLaVA's form; its pictures are named from this folder
    pictures/1.png, videos/2.mp4 ...    numbered as they were shown

Questions without an answer are left out: a training record cannot have them.
"""

import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.records import Record, to_messages
from demo.limits import Limits
from demo.uploads import keep_file
from demo.wording import say
from vlm.chat_session import ChatSession, Medium
from vlm.errors import UserError
from vlm.video import SampledVideo

RECORD = "conversation.json"
FOLDERS = {"image": "pictures", "video": "videos"}
MAX_RECORD = 4_000_000  # bytes
MAX_ENTRIES = 200  # of a zip
MAX_DIRECTORY = MAX_ENTRIES * 300  # bytes of a zip's list of entries, with names of some length
MAX_RATIO = 50  # times as large as the zip; pictures and videos hardly shrink, text some 10 times
# What a damaged zip, or one in a way that is not known here, raises.
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(NotImplementedError, RuntimeError),
)


@dataclass(frozen=True)
class Restored:
    """A conversation as `ChatSession` holds it; `images` are (path of our copy, medium)."""

    system: str | None
    messages: list[dict[str, Any]]
    images: list[tuple[str, Medium]]


def pack(chat: ChatSession, path: Path) -> bool:
    """Write a conversation and its pictures as a zip; False: nothing was answered yet."""
    turns = chat.to_record(path.stem)["conversations"]
    kept_turns = [turn for turn in turns[:1] if turn["from"] == "system"]
    first, seen = len(kept_turns), 0
    files: list[tuple[str, Medium]] = []
    for number in range(first, len(turns) - 1, 2):
        num = len(chat.messages[number]["content"]) - 1
        if turns[number + 1]["value"].strip():
            kept_turns += turns[number : number + 2]
            files += chat.images[seen : seen + num]
        seen += num
    if len(kept_turns) == first:
        return False
    record: dict[str, Any] = {"id": path.stem}
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, medium) in enumerate(files, start=1):
            kind = "video" if isinstance(medium, SampledVideo) else "image"
            inside = f"{FOLDERS[kind]}/{number}{Path(name).suffix}"
            record.setdefault(kind, []).append(inside)
            archive.write(name, inside)
        record["conversations"] = kept_turns
        text = json.dumps([record], indent=2, ensure_ascii=False)
        archive.writestr(RECORD, text + "\n")
    return True


def unpack(
    source: Path, chat: ChatSession, folder: Path, limits: Limits, language: str
) -> Restored:
    """Read a conversation that `pack` wrote, or any LLaVA-format JSON without pictures.

    Args:
        source: a zip, or a JSON file.
        chat: whose model will look at them; it is not changed.
        folder: pictures are drawn anew into it.
        limits: the largest pictures, and how many.
        language: of the errors.

    Raises:
        UserError: it is neither, its record is none, or a picture is missing or refused.
    """
    if not zipfile.is_zipfile(source):
        with source.open("rb") as file:
            return _restore(_record(file.read(MAX_RECORD + 1), language), [], language)
    try:
        _check_directory(source, language)
        with zipfile.ZipFile(source) as archive:
            _check_sizes(archive, source.stat().st_size, limits, language)
            record = _record(_member(archive, RECORD, MAX_RECORD, language), language)
            names = _in_shown_order(record)
            if len(names) > limits.max_pictures:
                raise UserError(say(language, "too_many_pictures", limit=limits.max_pictures))
            media = []
            for number, name in enumerate(names):
                data = _member(archive, name, limits.max_file_bytes, language)
                given = folder / f"given-{number}"
                given.write_bytes(data)
                try:
                    media.append(keep_file(given, name, chat, folder, limits, language))
                finally:
                    given.unlink()
    except BROKEN as error:
        raise UserError(say(language, "no_conversation")) from error
    return _restore(record, media, language)


def _check_directory(source: Path, language: str) -> None:
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


def _check_sizes(archive: zipfile.ZipFile, size: int, limits: Limits, language: str) -> None:
    """Refuse a zip of so many bytes that holds too many entries, or too much of them.

    What an entry tells of its size may be untrue; `_member` reads no more than it may.

    Raises:
        UserError: it does.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise UserError(say(language, "too_many_in_zip", limit=MAX_ENTRIES))
    most = min(limits.max_upload_bytes, MAX_RECORD + MAX_RATIO * size)
    if sum(entry.file_size for entry in entries) > most:
        raise UserError(say(language, "zip_too_large", limit=most // 1_000_000))


def _member(archive: zipfile.ZipFile, name: str, most: int, language: str) -> bytes:
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


def _record(data: bytes, language: str) -> Record:
    """Return the only record of a JSON file.

    Raises:
        UserError: it is none; the sentence says why.
    """
    if len(data) > MAX_RECORD:
        limit = MAX_RECORD // 1_000_000
        raise UserError(say(language, "file_too_large", name=RECORD, limit=limit))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(say(language, "no_conversation")) from error
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(say(language, "one_conversation", count=len(value)))
        value = value[0]
    return to_messages(value, RECORD)


def _in_shown_order(record: Record) -> list[str]:
    """Return the names of a record's pictures and videos in the order of their placeholders."""
    names = {"image": map(str, record.images), "video": iter(record.videos)}
    entries = (entry["type"] for message in record.messages for entry in message["content"])
    return [next(names[kind]) for kind in entries if kind in names]


def _restore(record: Record, media: list[tuple[str, Medium]], language: str) -> Restored:
    """Return what a record holds, pictures and videos before the text of their turn.

    Raises:
        UserError: it has some, but came without.
    """
    count = len(record.images) + len(record.videos)
    if count != len(media):
        raise UserError(say(language, "pictures_missing", count=count))
    messages = [_in_order(message) for message in record.messages]
    system = messages[0]["content"][0]["text"] if messages[0]["role"] == "system" else None
    return Restored(system, messages, media)


def _in_order(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as `ChatSession` writes it; a picture's placeholder ends with a newline."""
    media = [entry for entry in message["content"] if entry["type"] != "text"]
    texts = (entry["text"] for entry in message["content"] if entry["type"] == "text")
    text = {"type": "text", "text": "".join(text.removeprefix("\n") for text in texts)}
    return {"role": message["role"], "content": [*media, text]}
