"""How is a conversation kept in one file that `vlm train` reads when it is unpacked?

    conversation.json     one record in LLaVA's form; its pictures are named from this folder
    second.json           another with a second model's answers, if there was one
    pictures/1.png, videos/2.mp4 ...    numbered as they were shown

Questions without an answer are left out: a training record cannot have them.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_recipes.records import Record, to_messages
from demo.limits import Limits
from demo.told import is_disk_full
from demo.uploads import VIDEOS, is_video_name, keep_file
from demo.wording import say
from demo.zips import BROKEN, check_directory, check_sizes, member
from vlm.chat_session import ChatSession, Medium
from vlm.errors import UserError
from vlm.video import SampledVideo

RECORD, SECOND = "conversation.json", "second.json"
FOLDERS = {"image": "pictures", "video": "videos"}
MAX_RECORD = 4_000_000  # bytes


@dataclass(frozen=True)
class Restored:
    """A conversation as `ChatSession` holds it; `images` are (path of our copy, medium)."""

    system: str | None
    messages: list[dict[str, Any]]
    images: list[tuple[str, Medium]]
    second: "Restored | None" = None

    def put_into(self, chat: ChatSession) -> None:
        """Let a conversation go on where this one ended."""
        chat.clear()
        chat.system, chat.messages, chat.images = self.system, self.messages, self.images


def pack(chat: ChatSession, path: Path, second: ChatSession | None = None) -> bool:
    """Write a conversation and its pictures as a zip; False: nothing was answered yet.

    Args:
        chat: the conversation.
        path: of the zip.
        second: the same questions, answered by a second model.
    """
    kept = {RECORD: _answered(chat)} | ({} if second is None else {SECOND: _answered(second)})
    if not kept[RECORD].turns:
        return False
    inside: dict[str, str] = {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, medium in (file for one in kept.values() for file in one.files):
            if name not in inside:
                kind = FOLDERS["video" if isinstance(medium, SampledVideo) else "image"]
                inside[name] = f"{kind}/{len(inside) + 1}{Path(name).suffix}"
                archive.write(name, inside[name])
        for file, one in kept.items():
            if one.turns:
                record = one.record(path.stem, inside)
                text = json.dumps([record], indent=2, ensure_ascii=False)
                archive.writestr(file, text + "\n")
    return True


@dataclass(frozen=True)
class _Answered:
    """The turns of a conversation's answered questions, in LLaVA's form, and their files."""

    turns: list[dict[str, str]]
    files: list[tuple[str, Medium]]

    def record(self, name: str, inside: Mapping[str, str]) -> dict[str, Any]:
        """Return a record; `inside` says what its files are called in the zip."""
        record: dict[str, Any] = {"id": name}
        for path, medium in self.files:
            kind = "video" if isinstance(medium, SampledVideo) else "image"
            record.setdefault(kind, []).append(inside[path])
        return record | {"conversations": self.turns}


def _answered(chat: ChatSession) -> _Answered:
    turns = chat.to_record("")["conversations"]
    kept_turns = [turn for turn in turns[:1] if turn["from"] == "system"]
    first, seen = len(kept_turns), 0
    files: list[tuple[str, Medium]] = []
    for number in range(first, len(turns) - 1, 2):
        num = len(chat.messages[number]["content"]) - 1
        if turns[number + 1]["value"].strip():
            kept_turns += turns[number : number + 2]
            files += chat.images[seen : seen + num]
        seen += num
    return _Answered(kept_turns if len(kept_turns) > first else [], files)


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
        check_directory(source, language)
        with zipfile.ZipFile(source) as archive:
            check_sizes(archive, source.stat().st_size, limits, MAX_RECORD, language)
            records = {
                name: _record(member(archive, name, MAX_RECORD, language), language)
                for name in (RECORD, SECOND)
                if name == RECORD or name in archive.namelist()
            }
            shown = {name: _in_shown_order(record, language) for name, record in records.items()}
            names = dict.fromkeys(name for some in shown.values() for name in some)
            if len(names) > limits.max_pictures:
                raise UserError(say(language, "too_many_pictures", limit=limits.max_pictures))
            media = {}
            for number, name in enumerate(names):
                data = member(archive, name, limits.max_file_bytes, language)
                given = folder / f"given-{number}"
                try:
                    given.write_bytes(data)
                    media[name] = keep_file(given, name, chat, folder, limits, language)
                finally:
                    given.unlink(missing_ok=True)
    except BROKEN as error:
        if is_disk_full(error):
            raise
        raise UserError(say(language, "no_conversation")) from error
    restored = {
        name: _restore(record, [media[file] for file in shown[name]], language)
        for name, record in records.items()
    }
    return replace(restored[RECORD], second=restored.get(SECOND))


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
    try:
        return to_messages(value, RECORD)
    except UserError as error:
        raise UserError(say(language, "no_record", reason=error)) from error


def _in_shown_order(record: Record, language: str) -> list[str]:
    """Return the names of a record's pictures and videos in the order of their placeholders.

    Raises:
        UserError: a video is a list of frames, or a file would be read as the other kind.
    """
    images, videos = list(map(str, record.images)), []
    for name in images:
        if is_video_name(name):
            raise UserError(say(language, "not_a_picture", name=name))
    for video in record.videos:
        if isinstance(video, tuple):
            raise UserError(say(language, "frames_in_record", name=video[0]))
        if not is_video_name(str(video)):
            raise UserError(say(language, "not_a_video", name=video, known=", ".join(VIDEOS)))
        videos.append(str(video))
    names = {"image": iter(images), "video": iter(videos)}
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
