"""In which orders does VMamba walk over a grid, and how are the walks joined again?

Shapes: B batch, H W grid, L = H * W places, K = 4 walks, C channels.

A walk is a permutation of the places, so taking features along the walks is one index-select in
channel-last data, and its transpose, the sum of the walks back at their places, is another. The
last two walks are the first two from the end; a scan that can run backwards (`reverse` in
`selective_scan.py`) needs no flipped copies, so `walks` gives them in forward order.

Source: `cross_scan_fwd` and `cross_merge_fwd` in MzeroMiko/VMamba, vmamba.py, which give
(B, 4, C, L) with the last two walks flipped.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["cross", "unidirectional", "bidirectional", "rotations"]

# Which of a mode's four walks the scan takes from the end. The reference's `scans` 0, 1, 2, 3.
REVERSE: dict[Mode, tuple[bool, bool, bool, bool]] = {
    "cross": (False, False, True, True),
    "unidirectional": (False, False, False, False),
    "bidirectional": (False, False, True, True),
    "rotations": (False, False, True, True),
}


def walks(mode: Mode, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return (4, L): the place, row * W + column, at each step of each walk.

    >>> walks("cross", 2, 3)[:2].tolist()
    [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]]
    """
    places = torch.arange(height * width, device=device)
    grid = places.view(height, width)
    if mode == "cross":
        second = grid.t().flatten()
    elif mode == "rotations":
        second = grid.rot90().flatten()
    else:
        second = places
    return torch.stack([places, second, places, second])


def inverse(order: Tensor) -> Tensor:
    """Return (4, L): the step at which each walk reaches each place."""
    return torch.argsort(order, dim=1)


def take_walks(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return x (B, L, C) along the walks, (B, L, 4, C); `order` of `walks`, `back` its inverse."""
    return _Take.apply(x, order, back)  # pyright: ignore[reportReturnType]


def join_walks(y: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return the sum (B, L, C) of what the walks (B, L, 4, C) bring to each place."""
    return _Join.apply(y, order, back)  # pyright: ignore[reportReturnType]


def take_own(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return x (B, L, 4, C) with each walk's own channels along that walk, same shape."""
    return _Permute.apply(x, order, back)  # pyright: ignore[reportReturnType]


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """(B, L, 4, C): walk k takes its places order[k]."""
    count = len(order)
    flat = order.t() * count + torch.arange(count, device=order.device)
    return x.flatten(1, 2).index_select(1, flat.flatten()).unflatten(1, (-1, count))


class _Take(torch.autograd.Function):
    """Autograd would add the gradients by index, which is slow; walks are undone by a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(1, order.t().flatten()).unflatten(1, (-1, len(order)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return join_walks(grads[0], *ctx.saved_tensors), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return _permute(y, back).sum(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return take_walks(grads[0], *ctx.saved_tensors), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return _permute(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, back = ctx.saved_tensors
        return take_own(grads[0], back, order), None, None
