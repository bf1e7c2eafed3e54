"""How is a selective scan fast with nothing but PyTorch? In blocks of time that stay in the cache.

Shapes: B batch, L sequence, D channels, G groups, d = D / G channels of a group, N states;
K blocks of time; a block is P pieces of T steps.

Four choices, measured in specs/backbones.md 5:
- A step's states lie as (B, G, N, d), channels innermost: one `addcmul_` a step, and the sums
  over N or d are batched matrix products.
- Where B * D * N is small, a step is too little work for one call. A block is then cut into P
  pieces that run side by side: first each from a zero state, then joined by their total decays
  exp(A * sum of steps), then again from the right states. No ratios, logs or cumulative products:
  where a decay underflows, zero is the right limit.
- Backward keeps only the state before each block and computes the others again.
- Nothing is flipped: a reversed group's rows are read from the end while a block is copied.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.encoders.scan_backends.problem import ScanProblem, refuse_second_derivative

BLOCK_ELEMENTS = 1 << 18  # of one block's states; a quarter of it is twice as slow, more is flat
STEP_ELEMENTS = 1 << 14  # below this a step costs the call, not the work


def missing(p: ScanProblem) -> str:
    """Return "": it runs anywhere."""
    return ""


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the last state (B, D, N); any floating type, any device."""
    batch, _, channels = p.u.shape
    groups, states = len(p.reverse), p.A.shape[1]
    step = p.delta if p.delta_bias is None else p.delta + p.delta_bias
    step = F.softplus(step) if p.softplus else step
    y, last = cast(
        "tuple[Tensor, Tensor]",
        _Scan.apply(
            p.u.unflatten(2, (groups, -1)),
            step.unflatten(2, (groups, -1)),
            _channels_last(p.A, groups),
            *(x if x.ndim == 4 else _channels_last(x, groups) for x in (p.B, p.C)),
            p.reverse,
        ),
    )
    y = y.flatten(2)
    if p.D is not None:
        y = torch.addcmul(y, p.D, p.u)
    y = y if p.z is None else y * F.silu(p.z)
    return y, last.transpose(2, 3).reshape(batch, channels, states)


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """(D, N) -> (G, N, d)."""
    return x.unflatten(0, (groups, -1)).transpose(1, 2)


class _Scan(torch.autograd.Function):
    """u, step (B, L, G, d); A (G, N, d); B, C (B, L, G, N) or (G, N, d) -> y, last (B, G, N, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        reverse: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(u, A, reverse)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        before = [u.new_zeros(u.shape[0], *A.shape)]  # the state before each block
        for span in blocks.spans:
            block = _Block(blocks, span, u, step, A, B, C)
            before.append(block.run(before[-1]))
            blocks.put(y, span, block.read_out())
        ctx.save_for_backward(u, step, A, B, C, *before[:-1])
        ctx.reverse = reverse
        return y, before[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        u, step, A, B, C, *before = ctx.saved_tensors
        grad_y, carry = grads
        blocks = _Blocks(u, A, ctx.reverse)
        grad_u, grad_step = (torch.empty(u.shape, dtype=u.dtype, device=u.device) for _ in "12")
        grad_A = torch.zeros_like(A)
        grad_B, grad_C = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (B, C))
        with torch.autocast(u.device.type, enabled=False):
            for span, state in zip(reversed(blocks.spans), reversed(before), strict=True):
                block = _Block(blocks, span, u, step, A, B, C)
                block.run(state)
                carry, got = block.back(blocks.get(grad_y, span), carry)
                blocks.put(grad_u, span, got["u"])
                blocks.put(grad_step, span, got["step"])
                grad_A += got["A"]
                for total, part in ((grad_B, got["B"]), (grad_C, got["C"])):
                    if total.ndim == 4:
                        blocks.put(total, span, part)
                    else:
                        total += part
        return grad_u, grad_step, grad_A, grad_B, grad_C, None


class _Blocks:
    """How is the sequence cut, and where do the rows of a block lie?"""

    def __init__(self, u: Tensor, A: Tensor, reverse: tuple[bool, ...]) -> None:
        batch, self.length = u.shape[:2]
        slab = max(1, batch * A.numel())
        rows = max(1, min(BLOCK_ELEMENTS // slab, self.length))
        self.pieces = max(1, min(-(-STEP_ELEMENTS // slab), int(rows**0.5)))
        self.spans = [
            (start, min(start + rows, self.length)) for start in range(0, self.length, rows)
        ]
        # Neighbouring groups of one direction are copied together: (first, end, reversed).
        edges = [g for g in range(1, len(reverse)) if reverse[g] != reverse[g - 1]]
        runs = zip([0, *edges], [*edges, len(reverse)], strict=True)
        self.runs = [(first, end, reverse[first]) for first, end in runs]

    def get(self, x: Tensor, span: tuple[int, int]) -> Tensor:
        """Return a span of x (B, L, G, -) in scan order as (T, P, B, G, -), zeros after its end."""
        count = span[1] - span[0]
        steps = -(-count // self.pieces)
        shape = (self.pieces * steps, x.shape[0], *x.shape[2:])
        rows = torch.empty(shape, dtype=x.dtype, device=x.device)
        rows[count:] = 0
        for first, end, reverse in self.runs:
            part = self._place(x, span, first, end, reverse).transpose(0, 1)
            rows[:count, :, first:end] = part.flip(0) if reverse else part
        return rows.unflatten(0, (self.pieces, steps)).transpose(0, 1)

    def put(self, x: Tensor, span: tuple[int, int], rows: Tensor) -> None:
        """Write (T, P, B, G, -), in scan order, to a span of x (B, L, G, -)."""
        rows = rows.transpose(0, 1).flatten(0, 1)[: span[1] - span[0]]
        for first, end, reverse in self.runs:
            part = rows[:, :, first:end]
            place = self._place(x, span, first, end, reverse)
            place.copy_((part.flip(0) if reverse else part).transpose(0, 1))

    def _place(
        self, x: Tensor, span: tuple[int, int], first: int, end: int, reverse: bool
    ) -> Tensor:
        """Return the part of x (B, L, G, -) where a span of scan order lies for some groups."""
        start, stop = span
        if reverse:
            start, stop = self.length - stop, self.length - start
        return x[:, start:stop, first:end]


class _Block:
    """One block's decays and states, forward and backward; (T, P, B, G, N, d) each.

    Rows after the sequence's end have step 0: they decay by 1, add 0, and pass the state on.
    """

    def __init__(
        self,
        blocks: _Blocks,
        span: tuple[int, int],
        u: Tensor,
        step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
    ) -> None:
        self.A = A
        self.u, self.step = blocks.get(u, span), blocks.get(step, span)
        # (T, P, B, G, N, 1), or (G, N, d) where constant in time.
        self.B, self.C = (blocks.get(x, span).unsqueeze(-1) if x.ndim == 4 else x for x in (B, C))
        self.decay = (self.step.unsqueeze(-2) * A).exp_()
        self.states = (self.step * self.u).unsqueeze(-2) * self.B  # `run` makes them states
        self.before = self.states[0]  # the state before each piece, (P, B, G, N, d)

    def run(self, state: Tensor) -> Tensor:
        """Compute the block's states from the one before it, (B, G, N, d); return the last."""
        decay, states = self.decay, self.states
        pieces = states.shape[1]
        if pieces == 1:
            self.before = state.unsqueeze(0)
        else:
            local = torch.zeros_like(states[0])
            for added, factor in zip(states.unbind(), decay.unbind(), strict=True):
                local = torch.addcmul(added, factor, local)
            starts = [state]
            for end, factor in zip(local[:-1].unbind(), self._total()[:-1].unbind(), strict=True):
                starts.append(torch.addcmul(end, factor, starts[-1]))
            self.before = torch.stack(starts)
        state = self.before
        for here, factor in zip(states.unbind(), decay.unbind(), strict=True):
            state = here.addcmul_(factor, state)
        return state[-1].clone()

    def _total(self) -> Tensor:
        """Return each piece's decay from before its first step to its last, (P, B, G, N, d)."""
        return (self.step.sum(0).unsqueeze(-2) * self.A).exp_()

    def read_out(self) -> Tensor:
        """Return the sum over n of C[n] state[n], (T, P, B, G, d)."""
        return _over_states(self.C, self.states)

    def back(self, grad_y: Tensor, carry: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of the state before the block, and those of the block's inputs.

        Args:
            grad_y: (T, P, B, G, d).
            carry: the gradient that the block's last state has from later ones, (B, G, N, d).
        """
        grad, carry = self._back_through_time(grad_y, carry)
        got = {"C": _over_channels(self.C, self.states, grad_y)}
        # The decay's gradient is grad * (state before); times the decay itself: its exponent's.
        exponent = self.decay.mul_(grad)
        exponent[0] *= self.before
        exponent[1:] *= self.states[:-1]
        into = _over_states(self.B, grad)
        got["u"] = into * self.step
        got["step"] = torch.addcmul((exponent * self.A).sum(-2), into, self.u)
        got["A"] = exponent.mul_(self.step.unsqueeze(-2)).sum((0, 1, 2))
        got["B"] = _over_channels(self.B, grad, self.step * self.u)
        return carry, got

    def _back_through_time(self, grad_y: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of all the block's states, and of the one before it."""
        decay = self.decay.unbind()
        grad = grad_y.unsqueeze(-2) * self.C
        into = grad.unbind()
        pieces = grad.shape[1]
        if pieces == 1:
            into[-1].add_(carry)
        else:
            local = torch.zeros_like(grad[0])
            for here, factor in zip(reversed(into), reversed(decay), strict=True):
                local = (here + local).mul_(factor)
            ends = [carry]
            total = self._total()
            for piece in range(pieces - 1, 0, -1):
                ends.append(torch.addcmul(local[piece], total[piece], ends[-1]))
            into[-1].add_(torch.stack(ends[::-1]))
        for t in range(len(into) - 2, -1, -1):
            into[t].addcmul_(decay[t + 1], into[t + 1])
        return grad, decay[0][0] * grad[0, 0]


def _over_states(weights: Tensor, x: Tensor) -> Tensor:
    """Return the sum over N of weights * x (T, P, B, G, N, d): (T, P, B, G, d)."""
    if weights.ndim == 3:  # (G, N, d), constant in time
        return (x * weights).sum(-2)
    if weights.shape[-2] == 1:  # thousands of 1 x 1 matrices are slow
        return (x * weights).squeeze(-2)
    return (weights.transpose(-1, -2) @ x).squeeze(-2)


def _over_channels(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of weights: the sum of x (T, P, B, G, N, d) * y (T, P, B, G, d)."""
    if weights.ndim == 3:
        return (x * y.unsqueeze(-2)).sum((0, 1, 2))
    if weights.shape[-2] == 1:
        return (x.squeeze(-2) * y).sum(-1, keepdim=True)
    return (x @ y.unsqueeze(-1)).squeeze(-1)
