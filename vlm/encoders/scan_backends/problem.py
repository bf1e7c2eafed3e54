"""What does every backend of the selective scan get, and what does it give back?

Shapes: B batch, L sequence, D channels, G groups of D / G neighbouring channels, N states.
A letter is a size in a comment and the tensor of that name in code, as in the Mamba paper.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanProblem:
    """A checked selective scan, channels last, all tensors of one floating type (32 or 64 bits).

    For each channel, with n running over its states and time over the sequence (from its end where
    the channel's group is reversed):

        step = softplus(delta + delta_bias)         (softplus only if `softplus`)
        state[n] = exp(step A[n]) state[n] + step B[n] u
        y = (sum over n of C[n] state[n] + D u) * silu(z)

    Attributes:
        u, delta, z: (B, L, D), any strides; z may be None.
        A: (D, N).
        B, C: (B, L, G, N), one value for all channels of a group, or (D, N), constant in time.
        D, delta_bias: (D), or None.
        reverse: for each of the G groups, whether it is scanned from the end to the start.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    softplus: bool
    reverse: tuple[bool, ...]


class Backend(Protocol):
    """A module of this package that computes the scan."""

    def missing(self, p: ScanProblem, /) -> str:
        """Return why it cannot run this problem here; "" if it can."""
        ...

    def scan(self, p: ScanProblem, /) -> tuple[Tensor, Tensor]:
        """Return y (B, L, D) and the state after the last step, (B, D, N), with gradients."""
        ...


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is recorded: what a kernel computes would be left out of it.

    Raises:
        RuntimeError: `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "selective scan: only backend='reference' has second derivatives (create_graph=True)"
        )
