"""How do processes compare their rows with each other's, and still learn as one process would?

Shapes: B rows of this process, A rows of all processes, one process after the other.

A loss over all rows is a sum over processes. Each process takes the gradient of its own summand;
what that summand owes to the others' rows has to reach them, so the gradients of gathered rows are
added over the processes on the way back. LAVIS gathers its contrast's features without gradient,
which lets half of it go; two processes then learn something else than one with twice the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Rows (B, ...), B equal in all processes, as (processes, B, ...), with gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        added = gradients[0].contiguous()
        dist.all_reduce(added)
        return added[dist.get_rank()]


def exchange_sizes(num_rows: int, length: int, device: torch.device) -> tuple[list[int], int]:
    """Return how many rows each process has, and the longest of their lengths."""
    own = torch.tensor([num_rows, length], device=device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    sizes = torch.stack(parts).tolist()
    return [count for count, _ in sizes], max(longest for _, longest in sizes)


def gather_rows(counts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return what makes (A, ...) of (B, ...), with gradients, in every process alike.

    Args:
        counts: how many rows each process has.
    """
    most = max(counts)

    def gather(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded = torch.cat([rows, padded[len(rows) :]])
        parts = _AllGather.apply(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return gather
