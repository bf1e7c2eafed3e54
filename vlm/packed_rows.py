"""Where do packed documents stand, and how are they taken apart into rows of their own?

Shapes: B batch, L sequence, P documents, M the longest of them.

A place is a position of the flattened batch: row * L + column.
"""

import torch
from torch import Tensor

from vlm.lm_head import document_starts


def document_places(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the places of each document's tokens, (P, M), -1 behind its end.

    Documents begin with a row, where `position_ids` (B, L) do not go on by one, and behind padding
    (0 in `attention_mask` (B, L)), which belongs to none of them.
    """
    real, first = _real_and_first(position_ids, attention_mask)
    places = real.flatten().nonzero()[:, 0]  # of all tokens
    document = first.flatten()[places].cumsum(0) - 1
    lengths = document.bincount()
    offset = torch.arange(len(places), device=places.device)
    offset = offset - (lengths.cumsum(0) - lengths)[document]
    table = places.new_full((len(lengths), int(lengths.max())), -1)
    table[document, offset] = places
    return table


def document_lengths(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return how long each row's documents are, (B, S) int32 that sum to L, 0 behind the last.

    A stretch of padding counts as a document, and nothing else is in it.
    """
    real, first = _real_and_first(position_ids, attention_mask)
    first[:, 1:] |= real[:, 1:] != real[:, :-1]
    first[:, 1:] &= real[:, 1:] | real[:, :-1]  # padding goes on
    document = first.cumsum(1) - 1
    lengths = torch.zeros(len(first), int(document.max()) + 1, dtype=torch.int32)
    return lengths.scatter_add_(1, document, torch.ones_like(document, dtype=torch.int32))


def document_numbers(lengths: Tensor) -> Tensor:
    """Return which document of its row each token is in, (B, L), from their lengths (B, S)."""
    numbers = torch.arange(lengths.shape[1])
    return torch.stack([numbers.repeat_interleave(row) for row in lengths])


def _real_and_first(position_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (B, L) which tokens are no padding, and which begin a document."""
    real = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.bool()
    first = torch.ones_like(real)
    first[:, 1:] = ~real[:, :-1]
    starts = document_starts(position_ids, attention_mask)
    if starts is not None:
        first[:, 1:] |= starts
    return real, first


def take_apart(x: Tensor, places: Tensor) -> Tensor:
    """(B, L, ...) -> (P, M, ...) with zeros behind each document."""
    taken = x.flatten(0, 1)[places.clamp(min=0)]
    behind = (places < 0).reshape(*places.shape, *[1] * (x.ndim - 2))
    return taken.masked_fill(behind, 0)


def put_back(y: Tensor, places: Tensor, batch: int, length: int) -> Tensor:
    """(P, M, ...) -> (B, L, ...) with zeros on padding."""
    real = places >= 0
    flat = y.new_zeros(batch * length, *y.shape[2:]).index_put((places[real],), y[real])
    return flat.unflatten(0, (batch, length))
