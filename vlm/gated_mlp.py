"""How does a gated feed-forward layer learn, keeping two wide tensors in place of four?

By itself autograd keeps four tensors of (N, F) for the backward pass: the gate, what the activation
makes of it, the up part, and the product of the last two. Here the first and the third are kept and
the others computed again, some rows at a time, so that nothing else is as large.

Shapes: N tokens, E language-model width, F width inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUTanh, SiLUActivation

from vlm.head_loss import is_plain

ROWS = 512  # at once: few enough that F = 2,432 is 5 MB, and products nearly as fast as of all
aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation function and its derivative: (x) and (gradient, x), of a shape each."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


_SILU = Activation(F.silu, aten.silu_backward)
_GELU_TANH = Activation(
    partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")
)
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    SiLUActivation: _SILU,
    nn.SiLU: _SILU,
    GELUTanh: _GELU_TANH,
}


@dataclass(frozen=True)
class GatedParts:
    """The modules of a gated layer: down(activation(gate(x)) * up(x))."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: nn.Module

    def are_plain(self) -> bool:
        """Return whether they are linear layers without bias and a known activation, all on a CPU.

        "meta" stands for the CPU where a step is planned. Weights are float32: a lower type would
        be rounded after each block of rows.
        """
        activation = self.activation
        watched = activation._forward_hooks or activation._forward_pre_hooks
        return (
            type(activation) in ACTIVATIONS
            and not watched
            and all(
                isinstance(linear, nn.Linear)
                and linear.bias is None
                and is_plain(linear)
                and linear.weight.device.type in ("cpu", "meta")
                and linear.weight.dtype == torch.float32
                for linear in (self.gate, self.up, self.down)
            )
        )


def gated_mlp(x: Tensor, parts: GatedParts) -> Tensor:
    """Return what plain parts make of (..., E), in the same shape."""
    weights = (parts.gate.weight, parts.up.weight, parts.down.weight)
    out: Any = _GatedMlp.apply(x, *weights, ACTIVATIONS[type(parts.activation)])
    return out


class _GatedMlp(torch.autograd.Function):
    """See `gated_mlp`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation
    ) -> Tensor:
        rows = x.flatten(0, -2)
        kept, outs = [], []
        for part in rows.split(ROWS):
            gated, upped = part @ gate.t(), part @ up.t()
            outs.append(activation.apply(gated).mul_(upped) @ down.t())
            kept += [gated, upped]
        ctx.save_for_backward(rows, gate, up, down, *kept)
        ctx.activation, ctx.shape = activation, x.shape
        return torch.cat(outs).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: Tensor
    ) -> Any:
        rows, gate, up, down, *kept = ctx.saved_tensors
        of_out = outer[0].reshape(rows.shape)
        learns_x, *learn, _ = ctx.needs_input_grad
        of_gate, of_up, of_down = (_Sum(wanted) for wanted in learn)
        of_rows = []
        parts = rows.split(ROWS), of_out.split(ROWS), kept[::2], kept[1::2]
        for part, slope, gated, upped in zip(*parts, strict=True):
            active = ctx.activation.apply(gated)
            of_down.add(slope, active * upped if of_down.wanted else active)
            inner = slope @ down  # (rows, F): of active * upped
            of_upped = active.mul_(inner)
            of_gated = ctx.activation.slope(inner.mul_(upped), gated)
            of_up.add(of_upped, part)
            of_gate.add(of_gated, part)
            if learns_x:
                of_rows.append((of_gated @ gate).addmm_(of_upped, up))
        of_x = torch.cat(of_rows).view(ctx.shape) if learns_x else None
        return of_x, of_gate.total, of_up.total, of_down.total, None


class _Sum:
    """The gradient of a weight (O, I), summed over rows; None if it is not wanted."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.total: Tensor | None = None

    def add(self, slope: Tensor, inputs: Tensor) -> None:
        """Add what rows' slopes (n, O) and inputs (n, I) give."""
        if not self.wanted:
            return
        if self.total is None:
            self.total = slope.t() @ inputs
        else:
            self.total.addmm_(slope.t(), inputs)
