"""How do hidden states look at media when some of them may see none?

Shapes: B batch, L positions, M media tokens of a row, P channels of a head.

Surprises:
- A softmax over no keys at all is 0 / 0. That torch's kernels make zeros of it is promised nowhere,
  and a NaN would reach the gradients even of what is not used. Such positions therefore look at
  everything, and what they saw is put aside afterwards.
- Without any media (M = 0) queries, keys and values still take part, with gradients of zero, so
  that every rank of a distributed run trains the same parameters. A sum over an empty slice is 0
  whatever the numbers are; 0 * sum is not, should one be infinite.
"""

from typing import Literal

import torch
from torch import Tensor

from connectors.attention import attend

Unseen = Literal["zero", "uniform"]


def attend_media(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mask: Tensor | None,
    unseen: Unseen = "zero",
) -> Tensor:
    """Return what each position finds in the media it may see.

    Args:
        query: (B, L, num_heads * P).
        key: (B, M, num_heads * P).
        value: as `key`.
        num_heads: of the attention.
        mask: (B, L, M) bool, True where a position may look; None: everywhere.
        unseen: what a position gets that may look at nothing: zeros, or the mean of all values of
            its row.

    Returns:
        (B, L, num_heads * P).
    """
    if key.shape[1] == 0:
        nothing = query[..., :0].sum() + key.sum() + value.sum()
        return torch.zeros_like(query) + nothing.to(query.dtype)
    if mask is None:
        return attend(query, key, value, num_heads)
    sees = mask.any(-1, keepdim=True)  # (B, L, 1)
    found = attend(query, key, value, num_heads, mask | ~sees)
    other = torch.zeros_like(found) if unseen == "zero" else value.mean(1, keepdim=True)
    return torch.where(sees, found, other)
