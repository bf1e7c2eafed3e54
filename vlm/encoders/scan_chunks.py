"""How is a sequence cut into chunks, and how much decays between two steps of one chunk?

The Mamba-2 scan (`ssd.py`) and the matrix LSTM (`mlstm.py`) share this: inside a chunk every step
looks at every earlier one by a matrix product, between chunks only a state is handed on.
Shapes: ... any leading dimensions, L sequence, Q steps of a chunk.

Surprise: the sum of logs between two steps is a difference of running sums, and where those reach
thousands (one step that forgets everything), float32 has no digits left for a small difference
(1e4 + 0.1 - 1e4 = 0.0996). So the running sum is made in float64 and kept as two float32 numbers,
whose differences are exact to float32; the reference of Mamba-2 sums a masked (Q, Q) matrix for
the same end, which is slower.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_length(length: int, longest: int) -> int:
    """Return Q, so that `length` is cut into as few chunks of up to `longest`, equally long.

    197 steps in chunks of up to 64 are 4 chunks of 50, not 3 of 64 and one of 5 padded to 64.
    """
    assert length > 0 and longest > 0, (length, longest)
    return math.ceil(length / math.ceil(length / longest))


def cut(x: Tensor, steps: int, dim: int = 1, value: float = 0.0) -> Tensor:
    """Return x with `dim`, of L, as two dimensions (chunks, `steps`), filled up with `value`."""
    dim = dim % x.ndim
    missing = -x.shape[dim] % steps
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing), value=value)
    return x.unflatten(dim, (-1, steps))


def segment_sums(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return running sums (..., Q) of logs (..., Q), and sums between steps (..., Q, Q).

    The second has at [i, j] the sum of logs[j + 1] to logs[i]; -inf where j is later than i.
    Both have the type of `logs`, float32 or float64.
    """
    running = logs.double().cumsum(-1)
    high = running.to(logs.dtype)
    low = (running.detach() - high.detach().double()).to(logs.dtype)  # no gradient of its own
    sums = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    # The diagonal is 0 by itself, but its two gradients would cancel only up to rounding.
    fixed = logs.new_full(sums.shape[-2:], -torch.inf).triu(1)
    earlier = torch.ones_like(fixed, dtype=torch.bool).tril(-1)
    return high, torch.where(earlier, sums, fixed)
