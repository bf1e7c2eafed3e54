"""How is a conversation kept in one file that `vlm train` reads when it is unpacked?

    conversation.json     one record in LLaVA's form; its pictures are named from this folder
    pictures/1.png ...    in the order in which they were shown

Questions without an answer are left out: a training record cannot have them.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.records import Record, to_messages
from demo.limits import Limits
from demo.uploads import keep_picture
from demo.wording import say
from vlm.chat_session import ChatSession
from vlm.errors import UserError

RECORD = "conversation.json"
MAX_RECORD = 4_000_000  # bytes


@dataclass(frozen=True)
class Restored:
    """A conversation as `ChatSession` holds it; pictures are (path of our copy, picture)."""

    system: str | None
    messages: list[dict[str, Any]]
    images: list[tuple[str, Any]]


def pack(chat: ChatSession, path: Path) -> bool:
    """Write a conversation and its pictures as a zip; False: nothing was answered yet."""
    record = chat.to_record(path.stem)
    turns, names = record["conversations"], [name for name, _ in chat.images]
    kept_turns = [turn for turn in turns[:1] if turn["from"] == "system"]
    kept_names: list[str] = []
    dialogue, seen = turns[len(kept_turns) :], 0
    for question, answer in zip(dialogue[::2], dialogue[1::2], strict=True):
        shown = names[seen : seen + question["value"].count("<image>")]
        seen += len(shown)
        if answer["value"].strip():
            kept_turns += [question, answer]
            kept_names += shown
    if not any(turn["from"] == "gpt" for turn in kept_turns):
        return False
    inside = [f"pictures/{n}{Path(name).suffix}" for n, name in enumerate(kept_names, start=1)]
    out: dict[str, Any] = {"id": path.stem}
    if inside:
        out["image"] = inside[0] if len(inside) == 1 else inside
    text = json.dumps([out | {"conversations": kept_turns}], indent=2, ensure_ascii=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(RECORD, text + "\n")
        for name, source in zip(inside, kept_names, strict=True):
            archive.write(source, name)
    return True


def unpack(source: Path, folder: Path, limits: Limits, language: str) -> Restored:
    """Read a conversation that `pack` wrote, or any LLaVA-format JSON without pictures.

    Args:
        source: a zip, or a JSON file.
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
        with zipfile.ZipFile(source) as archive:
            record = _record(_member(archive, RECORD, MAX_RECORD, language), language)
            if len(record.images) > limits.max_pictures:
                raise UserError(say(language, "too_many_pictures", limit=limits.max_pictures))
            pictures = []
            for number, name in enumerate(record.images):
                data = _member(archive, str(name), limits.max_file_bytes, language)
                given = folder / f"given-{number}"
                given.write_bytes(data)
                try:
                    pictures.append(keep_picture(given, str(name), folder, limits, language))
                finally:
                    given.unlink()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(say(language, "no_conversation")) from error
    return _restore(record, pictures, language)


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


def _restore(record: Record, pictures: list[tuple[str, Any]], language: str) -> Restored:
    """Return what a record holds, pictures before the text of their turn.

    Raises:
        UserError: it has pictures, but came without.
    """
    if len(record.images) != len(pictures):
        raise UserError(say(language, "pictures_missing", count=len(record.images)))
    messages = [_in_order(message) for message in record.messages]
    system = messages[0]["content"][0]["text"] if messages[0]["role"] == "system" else None
    return Restored(system, messages, pictures)


def _in_order(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as `ChatSession` writes it; a picture's placeholder ends with a newline."""
    pictures = [entry for entry in message["content"] if entry["type"] == "image"]
    texts = (entry["text"] for entry in message["content"] if entry["type"] == "text")
    text = {"type": "text", "text": "".join(text.removeprefix("\n") for text in texts)}
    return {"role": message["role"], "content": [*pictures, text]}
