"""How does one sequence attend to another, whatever its heads and padding?

Shapes: T views, Q queries, K keys, P channels of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    num_key_heads: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(query key^T / sqrt(P)) value of all heads, side by side.

    Args:
        query: (T, Q, num_heads * P).
        key: (T, K, num_key_heads * P).
        value: as `key`.
        num_heads: heads of the queries.
        mask: True where a query may look: (T, K), the same for all queries, or (T, Q, K).
        num_key_heads: heads of keys and values, each serving several heads of the queries; all by
            default.
        dropout: share of the attention weights that is dropped; 0 outside training.

    Returns:
        (T, Q, num_heads * P).
    """
    key_heads = num_heads if num_key_heads is None else num_key_heads
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    mixed = F.scaled_dot_product_attention(
        _heads(query, num_heads),
        _heads(key, key_heads),
        _heads(value, key_heads),
        mask,
        dropout,
        enable_gqa=key_heads != num_heads,
    )
    return mixed.transpose(1, 2).flatten(2)


def attend_in_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Return what `attend` does, step by step, in the order of transformers' eager attention.

    For few queries in float32, where a fused kernel saves nothing: the sums round as the
    reference's do. Post-LN layers magnify that rounding; fused, the Q-Former's gradients differ in
    the sixth digit. A query that may look nowhere gets the mean of all values, not a NaN.
    """
    scores = _heads(query, num_heads) @ _heads(key, num_heads).transpose(2, 3)
    scores = scores * (query.shape[-1] // num_heads) ** -0.5  # (T, heads, Q, K)
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ _heads(value, num_heads)).transpose(1, 2).flatten(2)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return (T, heads, N, P) of (T, N, heads * P)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
