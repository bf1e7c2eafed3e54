"""How do conversations, each encoded by itself, become one batch: padded rows, or one packed row?

Shapes: L sequence, B batch, n images of the batch.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

IGNORE = -100  # the label of positions that are not learnt, as torch's cross-entropy has it
Encoded = Sequence[Mapping[str, Tensor]]


def padded(encoded: Encoded, pad_id: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    """Return the conversations as rows (B, L) of one length.

    Args:
        encoded: one dict per row.
        pad_id: what fills input_ids.
        side: where.
    """
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE, "loss_weights": 0.0}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [row[key] for row in encoded],
            batch_first=True,
            padding_value=value,
            padding_side=side,
        )
        for key, value in fill.items()
        if key in encoded[0]
    }


def packed(encoded: Encoded) -> dict[str, Tensor]:
    """Return the conversations as documents of one row (1, sum of L), unpadded.

    position_ids, which begin anew with each document, stand in place of the attention mask; no
    document's first token is learnt.
    """
    labels = [row["labels"].clone() for row in encoded]
    for document in labels:
        document[0] = IGNORE  # or it would be asked of the document before
    positions = [torch.arange(len(row["input_ids"])) for row in encoded]
    batch = {
        "input_ids": torch.cat([row["input_ids"] for row in encoded])[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.cat(labels)[None],
    }
    if "loss_weights" in encoded[0]:
        batch["loss_weights"] = torch.cat([row["loss_weights"] for row in encoded])[None]
    return batch


def joined(encoded: Encoded, keys: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of these names one after the other, where any conversation has them."""
    present = {key: [row[key] for row in encoded if key in row] for key in keys}
    return {key: torch.cat(values) for key, values in present.items() if values}
