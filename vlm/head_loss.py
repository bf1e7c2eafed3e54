"""How is the cross-entropy of a plain linear head learnt without keeping its logits?

Its gradient is computed with it, chunk by chunk: each chunk's logits become their own gradient in
place and are gone before the next chunk's are made. No logits wait for the backward pass and none
are computed twice: three matrix products, whatever the number of chunks.

Shapes: R supervised rows, C rows of a chunk, E language-model width, V vocabulary.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_plain(head: nn.Module) -> bool:
    """Return whether a head is a linear layer and nothing else.

    Adapters and quantised layers are classes of their own; ZeRO-3 and FSDP keep a piece of the
    weight and join it in hooks, which run only where the layer itself is called.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.shape == (head.out_features, head.in_features)
        and not head._forward_pre_hooks
        and not head._forward_hooks
        and not head._backward_hooks
        and "forward" not in vars(head)  # accelerate and others put theirs there
    )


def linear_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scales: Tensor | None,
    divisor: Tensor | float,
    chunk_rows: int,
) -> Tensor:
    """Return the cross-entropy of a plain head, summed and divided.

    Args:
        rows: (R, E) hidden states; R may be 0.
        weight: (V, E) of a plain head.
        bias: (V,) or None.
        targets: (R,) ids.
        scales: (R,) what each row's loss is multiplied by; None: 1.
        divisor: of the sum.
        chunk_rows: how many rows have logits at once.
    """
    learns = torch.is_grad_enabled()
    loss: Any = _LinearLoss.apply(rows, weight, bias, targets, scales, divisor, chunk_rows, learns)
    return loss


class _LinearLoss(torch.autograd.Function):
    """See `linear_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scales: Tensor | None,
        divisor: Tensor | float,
        chunk_rows: int,
        learns: bool,
    ) -> Tensor:
        wanted = [learns and needed for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(rows, weight, bias, wanted)
        total = torch.zeros((), device=rows.device)
        factors = torch.ones_like(targets, dtype=torch.float32) if scales is None else scales
        factors = factors.float() / divisor
        count = max(1, -(-len(rows) // chunk_rows))
        for part in _even_parts(len(rows), count):
            chunk, wish = rows[part], targets[part, None]
            logits = F.linear(chunk, weight, bias)  # (C, V), in autocast's type if it is on
            dtype = logits.dtype
            logits = logits.float()
            logs = torch.log_softmax(logits, 1, out=logits)
            total -= (logs.gather(1, wish)[:, 0] * factors[part]).sum()
            if any(wanted):
                # (softmax - one-hot), by the row's factor in what it is multiplied with
                slope = logs.exp_().scatter_add_(1, wish, -torch.ones_like(wish, dtype=logs.dtype))
                gradients.add(part, slope.to(dtype), chunk, factors[part, None])
            del logits, logs
        ctx.gradients = (gradients.rows, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: Tensor
    ) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a loss is learnt from once"
        (factor,) = outer
        if factor.device.type != "cpu" or factor != 1:  # nothing is left to do for a whole step
            gradients = [None if g is None else g.mul_(factor) for g in gradients]
        return (*gradients, None, None, None, None, None)


def _even_parts(length: int, count: int) -> list[slice]:
    """Return `count` slices of nearly equal size: the largest decides the memory."""
    ends = [length * n // count for n in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


class _Gradients:
    """Sums over chunks; None where nothing is wanted."""

    def __init__(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
    ) -> None:
        self.of_head = weight
        self.rows = torch.empty_like(rows) if wanted[0] else None
        self.learns_weight = wanted[1]
        self.weight: Tensor | None = None  # (V, E)
        self.bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None

    def add(self, part: slice, slope: Tensor, chunk: Tensor, factors: Tensor) -> None:
        """Add a chunk's: its slope (C, V), hidden states (C, E) and factors (C, 1)."""
        if self.rows is not None:
            self.rows[part] = (slope @ self.of_head.to(slope.dtype)) * factors
        if self.learns_weight:
            turned, scaled = slope.t(), (chunk * factors).to(slope.dtype)
            if self.weight is None:
                self.weight = (turned @ scaled).to(self.of_head.dtype)
            elif self.weight.dtype == slope.dtype:
                self.weight.addmm_(turned, scaled)
            else:
                self.weight += turned @ scaled
        if self.bias is not None:
            self.bias += (factors.to(slope.dtype).t() @ slope)[0]
