"""What does a record cost beside the vision encoder? FLOPs by formula, sizes from a few records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from data_recipes.dataset import IGNORED, ConversationDataset, Skipped
from vlm.errors import UserError

SAMPLE = 16  # records that are looked at


@dataclass(frozen=True)
class PartWork:
    """One part of the model: its parameters, those that train, positions of a record it runs on."""

    parameters: int
    trained: int
    positions: float


@dataclass(frozen=True)
class RecordWork:
    """The mean record: views of one picture, FLOPs of everything but the vision encoder."""

    views_per_picture: float
    other_flops: float


def flops(parts: Sequence[PartWork], recomputed: bool) -> float:
    """Return the FLOPs of a training step on one record in everything after a frozen encoder.

    Two per parameter and position forward, as many for the gradient of the inputs and, where
    activations are recomputed, once more; two per parameter that trains for its own gradient. The
    products of attention with itself, some per cent, are left out.
    """
    passes = 3 if recomputed else 2
    return sum(2.0 * part.positions * (passes * part.parameters + part.trained) for part in parts)


def mean_work(
    model: Any, dataset: ConversationDataset, span: tuple[int, int], recomputed: bool
) -> RecordWork:
    """Return what the mean of a few records at positions [start, stop) costs.

    Records that cannot be used are left out here; the fault is told when they are asked for.
    """
    items = list(_sample(dataset, *span))
    count = max(1, len(items))
    tokens = sum(len(item["input_ids"]) for item in items) / count
    supervised = sum(int((item["labels"] != IGNORED).sum()) for item in items) / count
    shown = [item for item in items if "pixel_values" in item]
    pictures = sum(len(item["tile_grids"]) for item in shown)
    views = sum(len(item["pixel_values"]) for item in shown)
    parts, head = model.model, model.lm_head
    features = sum(height * width for height, width in parts.vision_tower.grids)
    embedding = parts.language_model.get_input_embeddings()
    body = _part(parts.language_model, tokens)
    table = _part(embedding, tokens)
    return RecordWork(
        views_per_picture=views / pictures if pictures else 1.0,
        other_flops=flops(
            [
                PartWork(body.parameters - table.parameters, body.trained - table.trained, tokens),
                _part(head, supervised),
                _part(parts.connector, features * views / count),
            ],
            recomputed,
        ),
    )


def _sample(dataset: ConversationDataset, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yield encoded records from the whole length of a span."""
    for position in range(start, stop, max(1, -(-(stop - start) // SAMPLE))):
        try:
            item = dataset[position]
        except UserError:
            continue
        if not isinstance(item, Skipped):
            yield item


def _part(module: nn.Module, positions: float) -> PartWork:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    return PartWork(sum(size for size, _ in sizes), trained, positions)
