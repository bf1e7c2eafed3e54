"""What is a valid training record? LLaVA conversations in, chat messages or one clear error out.

    {"id": "7", "image": "a.png" | ["a.png", "b.png"] | absent, "video": the same,
        "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}

Turns may use `role`/`content` and `user`/`assistant` instead, and the first may be a system turn;
what other suites write is read as this first (see record_forms.py).
Rules, all strict, because each was a silent loss somewhere (LLaVA, LLaVA-NeXT, InternVL, Cambrian):

- as many `<image>` placeholders as images, all of them in user turns, also when there is one image
  or none, and as many `<video>` placeholders as videos; LLaVA's `<image>` for a video is read where
  a record has no images and writes no `<video>`; who means the words (HTML has both) writes them
  otherwise: without a file a placeholder is a lost one, and would be learnt as a word;
- user and assistant turns alternate, a user's first, and an assistant's turn is the last;
- no turn is empty.

A placeholder stays where the author wrote it. LLaVA moves it to the front of its turn
(`preprocess_multimodal` in LLaVA's train.py; LLaVA-NeXT only if the turn has exactly one); a source
that says `image_position: first` gets the LLaVA-NeXT form of that rule, and nobody else does. With
`front_if_missing`, the pictures of a record that has no placeholder stand before its first
question, a line each, as InternVL's and MiniCPM's (one picture) and nanoVLM's (several) do. With
`image_position: none` pictures and videos are left out and the text stays: the data of a blind
baseline.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_recipes.image_files import Inside, VideoPlace
from data_recipes.record_forms import (
    IMAGE_PLACEHOLDER,
    PATH_IN_TEXT,
    TAG,
    VIDEO_PLACEHOLDER,
    is_frame,
    media_and_turns,
    show,
)
from vlm.errors import UserError

ROLES: dict[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MOST_CHARACTERS = 4096  # of a path, as Linux has it
ImagePosition = Literal["as_written", "first", "front_if_missing", "none"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One validated record.

    Attributes:
        id: the record's own id; empty if it has none.
        images: paths as written, or pictures inside the file, in the order of their placeholders.
        messages: chat messages; `content` is a list of image, video and text entries.
        videos: paths as written, videos inside the file, or tuples of frames, in the order of their
            placeholders.
    """

    id: str
    images: tuple[str | Inside, ...]
    messages: list[dict[str, Any]]
    videos: tuple[VideoPlace, ...] = ()


@dataclass(frozen=True)
class _Name:
    """What errors call a record; a class because counting lines is too slow to do for every one."""

    where: object
    id: Any

    def __str__(self) -> str:
        return str(self.where) if self.id is None else f"{self.where} (id {self.id!r})"

    def record_id(self) -> str:
        return "" if self.id is None else str(self.id)


def to_messages(raw: Any, where: object, image_position: ImagePosition = "as_written") -> Record:
    """Validate one raw record and split its placeholders into content entries.

    Args:
        raw: the decoded JSON value.
        where: names the file and line in errors; only turned into text when one is raised.
        image_position: "first" moves a turn's only placeholder to its front, as LLaVA does;
            "front_if_missing" adds those that are not written; "none" drops placeholders and
            pictures.

    Raises:
        UserError: the record breaks one of the rules above; the sentence names place and id.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a record must be a JSON object, this is {show(raw)}")
    name = _Name(where, raw.get("id"))
    pictures, files, conversation = media_and_turns(raw, name)
    images, videos = check_pictures(pictures, name), _videos(files, name)
    turns = _turns(conversation, raw, name)
    if videos and not images and not any(VIDEO_PLACEHOLDER in text for _, text in turns):
        turns = [(role, text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)) for role, text in turns]
    kinds = {IMAGE_PLACEHOLDER: len(images), VIDEO_PLACEHOLDER: len(videos)}
    if image_position == "front_if_missing":
        turns = _with_placeholders(turns, kinds)
    for placeholder, count in kinds.items():
        _check_placeholders(turns, placeholder, count, name)
    placed = [(role, _place(text, image_position, kinds)) for role, text in turns]
    if not all(text for _, text in placed):
        raise UserError(f"{name}: a turn holds nothing but a picture, which this source leaves out")
    messages = [{"role": role, "content": split_placeholders(text, kinds)} for role, text in placed]
    if image_position == "none":
        images, videos = (), ()
    return Record(id=name.record_id(), images=images, messages=messages, videos=videos)


def split_placeholders(
    text: str, placeholders: Iterable[str] = (IMAGE_PLACEHOLDER,)
) -> list[dict[str, str]]:
    """Return the content entries of one turn; text around a placeholder is kept to the letter."""
    entries: list[dict[str, str]] = []
    for piece in re.split(f"({'|'.join(placeholders)})", text):
        if piece in placeholders:
            entries.append({"type": piece[1:-1]})
        elif piece:
            entries.append({"type": "text", "text": piece})
    return entries


def check_pictures(pictures: list[Any], name: object) -> tuple[str | Inside, ...]:
    """Return a record's pictures, each a path or inside a file; `name` is the record's in errors.

    Raises:
        UserError: one is neither.
    """
    for picture in pictures:
        if not isinstance(picture, (str, Inside)) or not picture:
            raise UserError(
                f"{name}: 'image' must be a path or a list of paths, not {show(picture)}"
            )
        _check_path(picture, name)
    return tuple(pictures)


def _check_path(path: str | Inside, name: object) -> None:
    """Refuse what is no path, but an address or the picture itself."""
    if isinstance(path, Inside):
        return
    if path.startswith(("http://", "https://", "data:")):
        raise UserError(f"{name}: {show(path)} is no path; nothing is fetched, save it as a file")
    if len(path) > MOST_CHARACTERS:
        raise UserError(f"{name}: a path of {len(path)} characters: {show(path)}")


def _videos(files: list[Any], name: _Name) -> tuple[VideoPlace, ...]:
    for file in files:
        parts = file if isinstance(file, tuple) else (file,)
        if not parts or not all(part and isinstance(part, (str, Inside)) for part in parts):
            raise UserError(
                f"{name}: 'video' must be a path, a list of paths, or a list of frames, not "
                f"{show(file)}"
            )
        for part in parts:
            _check_path(part, name)
        if isinstance(file, tuple) and not all(map(is_frame, file)):
            odd = next(part for part in file if not is_frame(part))
            raise UserError(f"{name}: a video that is a list of frames has {show(odd)} among them")
    return tuple(files)


def _turns(conversation: Any, raw: Mapping, name: _Name) -> list[tuple[str, str]]:
    """Return (role, text) of every turn, checked for role, emptiness and order."""
    if conversation is None:
        hint = "; captions alone are for a Q-Former's first stage" if "caption" in raw else ""
        raise UserError(f"{name}: the key 'conversations' is missing; it has {sorted(raw)}{hint}")
    if not isinstance(conversation, list) or not conversation:
        raise UserError(
            f"{name}: 'conversations' must be a list with at least one question and answer"
        )
    turns = [_turn(turn, number, name) for number, turn in enumerate(conversation, start=1)]
    dialogue = turns[1:] if turns[0][0] == "system" else turns
    for number, (role, _) in enumerate(dialogue):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            turn = number + 1 + len(turns) - len(dialogue)
            raise UserError(f"{name}: turn {turn} must be the {expected}'s, but it is the {role}'s")
    if len(dialogue) < 2 or len(dialogue) % 2:
        raise UserError(
            f"{name}: the last question has no answer, so there is nothing to learn from it"
        )
    return turns


def _turn(turn: Any, number: int, name: _Name) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise UserError(f"{name}: turn {number} must be a JSON object, this is {show(turn)}")
    keys = ("role", "content") if "role" in turn else ("from", "value")
    for key in keys:
        if key not in turn:
            raise UserError(f"{name}: turn {number} has no {key!r}; it has {sorted(turn)}")
    role, text = turn[keys[0]], turn[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"{name}: turn {number} has role {show(role)}; use one of {', '.join(ROLES)}"
        )
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: turn {number} must have some text, not {show(text)}")
    _check_text(text, number, name)
    return ROLES[role], text


def _check_text(text: str, number: int, name: _Name) -> None:
    """Refuse a text that names a picture in a way that is not read, or is none."""
    for form, where in ((TAG, "'image': {tag: path}"), (PATH_IN_TEXT, "'image'")):
        if found := form.search(text):
            raise UserError(
                f"{name}: turn {number} holds {found[0]!r}, but no picture of it is known; give "
                f"its path in {where}, or write it otherwise where it is text"
            )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: turn {number} holds half a character ({error.object[error.start]!r}, a lone "
            "surrogate)"
        ) from error


def _check_placeholders(
    turns: list[tuple[str, str]], placeholder: str, expected: int, name: _Name
) -> None:
    kind = placeholder[1:-1]
    for number, (role, text) in enumerate(turns, start=1):
        if role != "user" and placeholder in text:
            raise UserError(
                f"{name}: turn {number} is the {role}'s and holds {placeholder}; "
                f"only the user's turns can show {'an' if kind == 'image' else 'a'} {kind}, and "
                f"where it is text, write it otherwise, such as &lt;{kind}&gt;"
            )
    found = sum(text.count(placeholder) for _, text in turns)
    if found != expected:
        raise UserError(
            f"{name}: {expected} {kind}(s) but {found} {placeholder} placeholder(s); "
            f"write one {placeholder} into a user's turn for each {kind}"
            + ("" if expected else f", or otherwise where it is text, such as &lt;{kind}&gt;")
        )


def _with_placeholders(
    turns: list[tuple[str, str]], kinds: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return the turns, with placeholders before the first question if there are none at all."""
    if any(placeholder in text for _, text in turns for placeholder in kinds):
        return turns
    first = [role for role, _ in turns].index("user")
    role, text = turns[first]
    lines = "".join(f"{placeholder}\n" * count for placeholder, count in kinds.items())
    return [*turns[:first], (role, lines + text), *turns[first + 1 :]]


def _place(text: str, image_position: ImagePosition, placeholders: Iterable[str]) -> str:
    """Apply the source's `image_position` to one turn (LLaVA's rule where it is "first")."""
    held = [each for each in placeholders for _ in range(text.count(each))]
    if image_position == "none" and held:
        for placeholder in held:
            text = text.replace(placeholder, "")
        return text.strip()
    if image_position != "first" or len(held) != 1:
        return text
    return f"{held[0]}\n{text.replace(held[0], '').strip()}".strip()
