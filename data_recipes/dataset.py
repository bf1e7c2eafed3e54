"""How does a position of the mixture become model inputs? Record, messages, images, processor.

A record that cannot be used is an error that names file, line and id. With `on_error="skip"` it
becomes a `Skipped` note instead: the batch is one row smaller, the note travels with the batch, the
trainer logs and counts it. It is never replaced by another record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from data_recipes.feature_store import FeatureStore, LostFeaturesError
from data_recipes.image_files import (
    MediaFile,
    VideoFile,
    load_media,
    locate,
    locate_video,
    shown_size,
)
from data_recipes.loss_weight import LossWeight, token_weight
from data_recipes.mixture import Mixture, Source
from data_recipes.pictures import Shown, num_pictures, stored_features
from data_recipes.readers import data_files, open_records
from data_recipes.records import Record, to_messages
from vlm.conversations import in_order
from vlm.errors import UserError
from vlm.video import SampledVideo

IGNORED = -100  # the label of a token that is not supervised
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

    position: int
    source: str
    row: int
    reason: str


class ConversationDataset(Dataset):
    """Map-style dataset over a mixture.

    `dataset[p]` takes p from 0 on over all epochs (epoch * len + offset), so workers need not be
    told which epoch it is.

    Args:
        sources: the data to mix.
        processor: a `VlmProcessor`; its `encode` makes the tensors.
        seed: decides the order, with the epoch.
        on_error: what a record that cannot be used leads to.
        max_length: rows longer than this are faults; nothing is ever truncated.

    Attributes:
        features: where a frozen encoder's features are read instead of the pictures; None: nowhere.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: Any,
        seed: int = 0,
        on_error: OnError = "raise",
        max_length: int | None = None,
    ) -> None:
        self.indexes = [open_records(source.path) for source in sources]
        self.mixture = Mixture(sources, [len(index) for index in self.indexes], seed)
        self.processor = processor
        self.on_error = on_error
        self.max_length = max_length
        self.features: FeatureStore | None = None

    def __len__(self) -> int:
        """Number of records in one epoch."""
        return len(self.mixture)

    def __getitems__(self, asked: list[int | tuple[int, ...]]) -> list[dict[str, Any] | Skipped]:
        """Return what a batch is made of; where rows are packed, a pack of positions is asked for.

        torch's loader calls this in place of `__getitem__` where it is there.
        """
        packs = [each if isinstance(each, tuple) else (each,) for each in asked]
        return [self[position] for pack in packs for position in pack]

    def __getitem__(self, position: int) -> dict[str, Any] | Skipped:
        """Return the encoded record at `position`, with `record_id`, or a note that it is skipped.

        Raises:
            UserError: the record cannot be used and `on_error` is "raise".
            LostFeaturesError: its picture's features are gone.
        """
        number, row = self.mixture.locate(position)
        try:
            return self.encode(number, row)
        except LostFeaturesError:
            raise
        except UserError as error:
            if self.on_error == "raise":
                raise
            return Skipped(position, self.mixture.sources[number].name, row, str(error))

    def record(self, number: int, row: int) -> Record:
        """Return record `row` of source `number`, validated."""
        index, source = self.indexes[number], self.mixture.sources[number]
        return to_messages(index[row], index.place(row), source.image_position)

    def num_tokens(self, position: int) -> int:
        """Return the length of the row at `position`; no picture and no frame is decoded.

        A record that cannot be used has 0; the fault is told when the record is asked for.
        """
        return self.count_tokens(*self.mixture.locate(position))

    def count_tokens(self, number: int, row: int) -> int:
        """Return the length of record `row` of source `number`; see `num_tokens`."""
        try:
            record = self.record(number, row)
            shown = [shown_size(file) for file in self.files(record, number)]
            return self.processor.num_tokens(record.messages, shown)
        except UserError:
            return 0

    def files(self, record: Record, number: int) -> list[MediaFile]:
        """Return where pictures and videos of a record of source `number` are, as they stand."""
        source = self.mixture.sources[number]
        root = image_root(source)
        images: list[MediaFile] = [locate(image, root) for image in record.images]
        if not record.videos:
            return images
        processor = self.processor.image_processor
        how = processor.video_config, processor.view_size, source.frame_rate
        videos = [VideoFile(locate_video(video, root), *how) for video in record.videos]
        return in_order(record.messages, images, videos)

    def encode(self, number: int, row: int) -> dict[str, Any]:
        """Return record `row` of source `number` as model inputs with labels."""
        record, index = self.record(number, row), self.indexes[number]
        try:
            encoded = self._encode(record.messages, self.files(record, number))
        except LostFeaturesError:
            raise
        except UserError as error:
            name = f" (id {record.id!r})" if record.id else ""
            raise UserError(f"{index.where(row)}{name}: {error}") from error
        if not bool((encoded["labels"][1:] != IGNORED).any()):
            raise UserError(
                f"{index.where(row)} (id {record.id!r}): no token of it is supervised; "
                "look at the chat template's {% generation %} marks"
            )
        record_id = record.id or f"{self.mixture.sources[number].name}[{row}]"
        return {**encoded, "record_id": record_id}

    def _encode(self, messages: list[dict[str, Any]], files: list[MediaFile]) -> dict[str, Any]:
        """Return a conversation with its pictures, or their features, as model inputs."""
        options = {"supervise": True, "max_length": self.max_length}
        if self.features is None or not files:
            media = [load_media(file) for file in files]
            images = [each for each in media if not isinstance(each, SampledVideo)]
            videos = [each for each in media if isinstance(each, SampledVideo)]
            return self.processor.encode(messages, images, videos=videos, **options)
        shown, maps = stored_features(files, self.processor.image_processor, self.features)
        encoded = self.processor.encode(messages, shown=shown, **options)
        return {**encoded, "vision_features": maps}

    def pictures(self, spans: Sequence[tuple[int, int]]) -> dict[Shown, int]:
        """Return how often each picture or video is shown at positions of [start, stop) spans.

        Records that cannot be used show none; the fault is told when they are asked for.

        Raises:
            UserError: a video whose frames are padded, which stored features do not tell.
        """
        padded = self.processor.image_processor.pads_frames
        shown: dict[Shown, int] = {}
        for (number, row), times in self.mixture.times_seen(spans).items():
            try:
                files = self.files(self.record(number, row), number)
            except UserError:
                continue
            siblings = num_pictures(files)
            if padded and siblings < len(files):
                raise UserError(
                    f"{self.indexes[number].where(row)}: features of videos are not stored where "
                    "the tiling pads frames; set feature_cache.mode to never, or tiling to resize"
                )
            for file in files:
                key = Shown(file, 0 if isinstance(file, VideoFile) else siblings)
                shown[key] = shown.get(key, 0) + times
        return shown


def image_root(source: Source) -> Path:
    """Return the folder that a source's image paths are relative to."""
    return Path(source.image_root) if source.image_root else data_files(source.path)[0].parent


@dataclass(frozen=True)
class Collator:
    """Turn dataset items into a batch; skipped records leave the batch smaller.

    The batch has two keys that are no tensors: `record_ids` (list of str) and `skipped` (list of
    `Skipped`); the trainer takes both out before the model is called.

    Args:
        processor: a `VlmProcessor`.
        packed: the records become one row without padding, each a document of its own.
        features: the dataset's; `vision_features` then stands in place of pixel_values, also where
            no row has a picture.
        loss_weight: what a record counts by, see `data_recipes.loss_weight`.
    """

    processor: Any
    packed: bool = False
    features: FeatureStore | None = None
    loss_weight: LossWeight = "token"

    def __call__(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        """Collate; a batch whose records are all skipped is one row without supervised tokens."""
        kept = [item for item in items if not isinstance(item, Skipped)]
        ids = [item["record_id"] for item in kept]
        rows = [{k: v for k, v in item.items() if k != "record_id"} for item in kept]
        rows = rows or [self._nothing()]
        if self.loss_weight != "token":
            rows = [_with_weights(row, self.loss_weight) for row in rows]
        pack = self.processor.pack
        batch = pack(rows) if self.packed else self.processor.collate(rows, padding_side="right")
        if self.features is not None:
            maps = [row["vision_features"] for row in rows if "vision_features" in row]
            none = self.features.layout.empty()  # so that no batch sends a blank view to the tower
            batch["vision_features"] = [torch.cat(of) for of in zip(none, *maps, strict=True)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        return {**batch, "record_ids": ids, "skipped": skipped}

    def _nothing(self) -> dict[str, torch.Tensor]:
        """A text row that adds nothing to the loss, so that every rank still takes its step."""
        token = self.processor.tokenizer.eos_token_id
        ids = torch.full((2,), token, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORED),
        }


def _with_weights(row: dict[str, torch.Tensor], kind: LossWeight) -> dict[str, torch.Tensor]:
    """Return a row with loss_weights (L,) beside its labels (L,), 0 where none is learnt."""
    learnt = row["labels"] != IGNORED
    learnt[0] = False  # nothing stands before it
    return {**row, "loss_weights": learnt * token_weight(int(learnt.sum()), kind)}
