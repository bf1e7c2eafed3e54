"""What is a valid training record? LLaVA conversations in, chat messages or one clear error out.

    {"id": "7", "image": "a.png" | ["a.png", "b.png"] | absent, "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

Turns may use `role`/`content` and `user`/`assistant` instead, and the first may be a system turn;
what other suites write is read as this first (see record_forms.py).
Rules, all strict, because each was a silent loss somewhere (LLaVA, LLaVA-NeXT, InternVL, Cambrian):

- as many `<image>` placeholders as images, all of them in user turns, also when there is one image;
- user and assistant turns alternate, a user's first, and an assistant's turn is the last;
- no turn is empty; `video` is refused, not ignored.

A placeholder stays where the author wrote it. LLaVA moves it to the front of its turn
(`preprocess_multimodal` in LLaVA's train.py; LLaVA-NeXT only if the turn has exactly one); a source
that says `image_position: first` gets the LLaVA-NeXT form of that rule, and nobody else does. With
`front_if_missing`, the pictures of a record that has no placeholder stand before its first
question, a line each, as InternVL's and MiniCPM's (one picture) and nanoVLM's (several) do. With
`image_position: none` the pictures are left out and the text stays: the data of a blind baseline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_recipes.image_files import Inside
from data_recipes.record_forms import IMAGE_PLACEHOLDER, pictures_and_turns, show
from vlm.errors import UserError

ROLES: dict[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ImagePosition = Literal["as_written", "first", "front_if_missing", "none"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One validated record.

    Attributes:
        id: the record's own id; empty if it has none.
        images: paths as written, or pictures inside the file, in the order of their placeholders.
        messages: chat messages; `content` is a list of image and text entries.
    """

    id: str
    images: tuple[str | Inside, ...]
    messages: list[dict[str, Any]]


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
    pictures, conversation = pictures_and_turns(raw, name)
    images = _images(pictures, name)
    turns = _turns(conversation, raw, name)
    if image_position == "front_if_missing":
        turns = _with_placeholders(turns, len(images))
    _check_placeholders(turns, len(images), name)
    placed = [(role, _place(text, image_position)) for role, text in turns]
    if not all(text for _, text in placed):
        raise UserError(f"{name}: a turn holds nothing but a picture, which this source leaves out")
    messages = [{"role": role, "content": split_placeholders(text)} for role, text in placed]
    kept = () if image_position == "none" else images
    return Record(id=name.record_id(), images=kept, messages=messages)


def split_placeholders(text: str) -> list[dict[str, str]]:
    """Return the content entries of one turn; text around a placeholder is kept to the letter."""
    entries: list[dict[str, str]] = []
    for position, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if position > 0:
            entries.append({"type": "image"})
        if piece:
            entries.append({"type": "text", "text": piece})
    return entries


def _images(pictures: list[Any], name: _Name) -> tuple[str | Inside, ...]:
    for picture in pictures:
        if not isinstance(picture, (str, Inside)) or not picture:
            raise UserError(
                f"{name}: 'image' must be a path or a list of paths, not {show(picture)}"
            )
    return tuple(pictures)


def _turns(conversation: Any, raw: Mapping, name: _Name) -> list[tuple[str, str]]:
    """Return (role, text) of every turn, checked for role, emptiness and order."""
    if conversation is None:
        raise UserError(f"{name}: the key 'conversations' is missing; it has {sorted(raw)}")
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
    return ROLES[role], text


def _check_placeholders(turns: list[tuple[str, str]], num_images: int, name: _Name) -> None:
    for number, (role, text) in enumerate(turns, start=1):
        if role != "user" and IMAGE_PLACEHOLDER in text:
            raise UserError(
                f"{name}: turn {number} is the {role}'s and holds {IMAGE_PLACEHOLDER}; "
                "only the user's turns can show an image"
            )
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    if placeholders != num_images:
        raise UserError(
            f"{name}: {num_images} image(s) but {placeholders} {IMAGE_PLACEHOLDER} placeholder(s); "
            f"write one {IMAGE_PLACEHOLDER} into a user's turn for each image"
        )


def _with_placeholders(turns: list[tuple[str, str]], num_images: int) -> list[tuple[str, str]]:
    """Return the turns, with placeholders before the first question if there are none at all."""
    if any(IMAGE_PLACEHOLDER in text for _, text in turns):
        return turns
    first = [role for role, _ in turns].index("user")
    role, text = turns[first]
    return [
        *turns[:first],
        (role, f"{IMAGE_PLACEHOLDER}\n" * num_images + text),
        *turns[first + 1 :],
    ]


def _place(text: str, image_position: ImagePosition) -> str:
    """Apply the source's `image_position` to one turn (LLaVA's rule where it is "first")."""
    if image_position == "none" and IMAGE_PLACEHOLDER in text:
        return text.replace(IMAGE_PLACEHOLDER, "").strip()
    if image_position != "first" or text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
