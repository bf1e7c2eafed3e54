"""How do an embedding and a head that are one matrix share one gradient?

By itself autograd makes a whole matrix (V, E) of zeros for the embedding, fills the rows of the ids
that were looked up, and adds it to the head's gradient into a third. Here those rows are added to
the head's gradient in place: with 152,000 words 10 % of a small model's step and two matrices less.

Shapes: B batch, L sequence, E language-model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlm.head_loss import is_plain


def look_up(
    embedding: nn.Module, head: nn.Module, ids: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the embeddings (B, L, E) of ids (B, L), and the weight (V, E) for the head to use.

    Both have to be used, so that the weight's gradient is whole. Nothing is returned where the two
    are not one matrix that learns, or where more is done than looking up.
    """
    if (
        type(embedding) is nn.Embedding
        and torch.is_grad_enabled()
        and embedding.weight is head.weight
        and embedding.weight.requires_grad
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding._forward_pre_hooks
        and not embedding._forward_hooks
        and "forward" not in vars(embedding)
        and is_plain(head)
    ):
        found: Any = _LookUp.apply(embedding.weight, ids, embedding.padding_idx)
        return found
    return None, None


class _LookUp(torch.autograd.Function):
    """See `look_up`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: Tensor
    ) -> Any:
        of_embeddings, of_head = outer
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:  # does not learn by being looked up
            of_embeddings = of_embeddings.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        return of_head.index_add_(0, ids.flatten(), of_embeddings.flatten(0, -2)), None, None
