"""How does a record become a picture and its caption? Where it has one of each.

Two forms, `{"image": "a.png", "caption": "A cat."}` and a conversation with one picture and one
answer: the answer is the caption, whatever was asked. A record with no picture, with several, or
with several answers is a fault: an error, or left out and counted where the recipe says so.

Two records belong together where they show one picture (the same file) or have one caption (the
same tokens). What decides a pair's negatives is drawn from the seed and the record's position in
the mixture, so that it does not depend on processes, workers or where a run was resumed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_recipes.dataset import ConversationDataset, Skipped, image_root
from data_recipes.image_files import ImageFile, Inside, load, locate
from data_recipes.record_forms import (
    IMAGE_PLACEHOLDER,
    TURN_KEYS,
    VIDEO_PLACEHOLDER,
    media_and_turns,
    show,
)
from data_recipes.records import Record, check_pictures, to_messages
from vlm.errors import UserError

DRAWS = 3  # tells these random numbers from the mixture's (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A picture as the record has it, its caption, and the record's id; empty if it has none."""

    id: str
    image: str | Inside
    text: str

    @property
    def images(self) -> tuple[str | Inside, ...]:
        """The one picture, as `Record` has its."""
        return (self.image,)


def to_caption(raw: Any, where: object) -> Caption:
    """Validate one raw record and take picture and caption out of it.

    Args:
        raw: the decoded JSON value.
        where: names the file and line in errors.

    Raises:
        UserError: the record breaks a rule of records.py, or has not one picture and one answer.
    """
    if isinstance(raw, Mapping) and not any(raw.get(key) is not None for key in TURN_KEYS):
        given = sorted(key for key, value in raw.items() if value is not None)
        name = _named(raw, where)
        raise UserError(f"{name}: has neither 'caption' nor 'conversations'; it has {given}")
    if isinstance(raw, Mapping) and raw.get("caption") is not None:
        return _written(raw, where)
    record = to_messages(raw, where)
    name = _named({"id": record.id or None}, where)
    _check_one_picture(len(record.images), len(record.videos), name)
    answers = _answers(record)
    if len(answers) != 1:
        raise UserError(f"{name}: a caption is a record's one answer, but this has {len(answers)}")
    return Caption(id=record.id, image=record.images[0], text=answers[0].strip())


def _written(raw: Mapping, where: object) -> Caption:
    """Return the caption of a record that has it under its own key."""
    name = _named(raw, where)
    if any(raw.get(key) is not None for key in TURN_KEYS if key != "caption"):
        raise UserError(f"{name}: a record has a caption or conversations, this has both")
    found, videos, _ = media_and_turns(raw, name)
    pictures = check_pictures(found, name)
    _check_one_picture(len(pictures), len(videos), name)
    text = raw["caption"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: the caption must be some text, not {show(text)}")
    if IMAGE_PLACEHOLDER in text or VIDEO_PLACEHOLDER in text:
        raise UserError(f"{name}: the caption {show(text)} holds a placeholder; take it out")
    number = "" if raw.get("id") is None else str(raw["id"])
    return Caption(id=number, image=pictures[0], text=text.strip())


def _named(raw: Mapping, where: object) -> str:
    """Return what errors call a record."""
    return str(where) if raw.get("id") is None else f"{where} (id {raw['id']!r})"


def _check_one_picture(pictures: int, videos: int, name: str) -> None:
    if pictures != 1 or videos:
        found = f"{pictures} picture(s)" + (f" and {videos} video(s)" if videos else "")
        raise UserError(f"{name}: a caption needs one picture and no video, but this has {found}")


def _answers(record: Record) -> list[str]:
    """Return the text of each of the assistant's turns."""
    return [
        "".join(entry["text"] for entry in message["content"])
        for message in record.messages
        if message["role"] == "assistant"
    ]


class CaptionDataset(ConversationDataset):
    """The same over a mixture, but each item is a pair; `processor` is an `ImageTextProcessor`.

    `max_length` counts the caption's tokens.
    """

    def __getitem__(self, position: int) -> dict[str, Any] | Skipped:
        """Return the pair at `position`, with what draws its negatives, or a note that it is out.

        Raises:
            UserError: the record cannot be used and `on_error` is "raise".
        """
        item = super().__getitem__(position)
        if isinstance(item, Skipped):
            return item
        draws = np.random.default_rng([self.mixture.seed, DRAWS, position]).random(2)
        return {**item, "draws": torch.from_numpy(draws)}

    def encode(self, number: int, row: int) -> dict[str, Any]:
        """Return record `row` of source `number`: tensors, numbers of picture and caption, id."""
        index, source = self.indexes[number], self.mixture.sources[number]
        caption = to_caption(index[row], index.place(row))
        file = locate(caption.image, image_root(source))
        assert self.max_length is not None, "the Q-Former's positions, if nothing else"
        try:
            encoded = self.processor.encode(load(file), caption.text, self.max_length)
        except UserError as error:
            name = f" (id {caption.id!r})" if caption.id else ""
            raise UserError(f"{index.where(row)}{name}: {error}") from error
        return {
            **encoded,
            "picture": _number(_identity(file).encode()),
            "caption": _number(encoded["input_ids"].numpy().tobytes()),
            "record_id": caption.id or f"{source.name}[{row}]",
        }

    def count_tokens(self, number: int, row: int) -> int:
        """Return the tokens of a record's caption; of a record that cannot be used, 0."""
        index = self.indexes[number]
        try:
            return self.processor.num_tokens(to_caption(index[row], index.place(row)).text)
        except UserError:
            return 0

    def texts(self, most: int) -> Iterator[str]:
        """Yield the captions of the first epoch, at most so many, without opening a picture.

        A record that cannot be used is left out: it is told of, or counted, when it is met.
        """
        for position in islice(range(len(self)), most):
            number, row = self.mixture.locate(position)
            index = self.indexes[number]
            try:
                yield to_caption(index[row], index.place(row)).text
            except UserError:
                continue


def _identity(file: ImageFile) -> str:
    """Return what a picture's file is known by, however it is written."""
    if isinstance(file, Inside):
        return f"{Path(file.path).resolve()}\0{file.key}"
    return str(Path(file).resolve())


def _number(content: bytes) -> int:
    """Return a number that tells contents apart, the same in every process."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class CaptionCollator:
    """Turn dataset items into a batch; skipped records leave the batch smaller.

    Beside the tensors the batch has `record_ids` (list of str) and `skipped` (list of `Skipped`).
    """

    processor: Any

    def __call__(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        """Collate; a batch whose records are all skipped is one pair that is not `real`.

        Returns:
            pixel_values (B, 3, S, S), input_ids and attention_mask (B, L), picture and caption
            (B,), draws (B, 2), real (B,).
        """
        kept = [item for item in items if not isinstance(item, Skipped)]
        rows = kept or [self._nothing()]
        return {
            **self.processor.collate(rows),
            "picture": torch.tensor([row["picture"] for row in rows]),
            "caption": torch.tensor([row["caption"] for row in rows]),
            "draws": torch.stack([row["draws"] for row in rows]),
            "real": torch.full((len(rows),), bool(kept)),
            "record_ids": [item["record_id"] for item in kept],
            "skipped": [item for item in items if isinstance(item, Skipped)],
        }

    def _nothing(self) -> dict[str, Any]:
        """A blank pair that adds nothing to the loss, so that every rank still takes its step."""
        size, tokenizer = self.processor.image_processor.view_size, self.processor.tokenizer
        return {
            "pixel_values": torch.zeros(1, 3, size, size),
            "input_ids": torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]),
            "picture": 0,
            "caption": 0,
            "draws": torch.zeros(2, dtype=torch.float64),
        }
