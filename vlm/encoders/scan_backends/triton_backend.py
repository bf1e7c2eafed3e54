"""When can the Triton kernels run, and what do they get?

Shapes: B batch, L sequence, D channels, G groups, N states, W channels of a program, T rows.
"""

import importlib.util
import os
from typing import Any, cast

import torch
from torch import Tensor

from vlm.encoders.scan_backends.problem import ScanProblem, refuse_second_derivative

TILE_ROWS, TILE_CHANNELS = 64, 32  # T, W; powers of two
WARPS = 4


def missing(p: ScanProblem) -> str:
    """Return why the kernels cannot run this problem; "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # Triton's interpreter runs kernels on a CPU, slowly: for tests.
    devices = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    if p.u.device.type not in devices or p.u.dtype != torch.float32:
        return f"it is for float32 on CUDA, not {p.u.dtype} on {p.u.device.type}"
    if p.B.ndim == 2 or p.C.ndim == 2:
        return "it takes B and C that change with time, not (D, N)"
    return ""


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the last state (B, D, N), float32."""
    zeros = p.u.new_zeros(p.u.shape[2])
    y, last = cast(
        "tuple[Tensor, Tensor]",
        _Scan.apply(
            *(p.u.contiguous(), p.delta.contiguous(), p.A.T.contiguous()),
            *(p.B.contiguous(), p.C.contiguous()),
            zeros if p.D is None else p.D.contiguous(),
            None if p.z is None else p.z.contiguous(),
            zeros if p.delta_bias is None else p.delta_bias.contiguous(),
            *(p.softplus, p.reverse),
        ),
    )
    return y, last.transpose(1, 2)


class _Scan(torch.autograd.Function):
    """The two kernels; inputs as in ScanProblem, contiguous, A and the last state as (N, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        bias: Tensor,
        softplus: bool,
        reverse: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor]:
        from vlm.encoders.scan_backends.triton_kernels import forward_kernel

        grid, sizes, blocks = _launch(u, B, TILE_ROWS, TILE_CHANNELS)
        directions = torch.tensor(reverse, dtype=torch.int32, device=u.device)
        keep = any(ctx.needs_input_grad)
        tiles = -(-u.shape[1] // TILE_ROWS) if keep else 0
        before = u.new_empty(u.shape[0], tiles, *A.shape)
        y, last = torch.empty_like(u), u.new_empty(u.shape[0], *A.shape)
        forward_kernel[grid](  # pyright: ignore[reportIndexIssue]
            (u, delta, u if z is None else z, B, C, A, D, bias, directions),
            (y, before, last),
            sizes,
            SOFTPLUS=softplus,
            GATE=z is not None,
            KEEP=keep,
            **blocks,
        )
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, directions, before)
        ctx.settings = softplus, TILE_ROWS, TILE_CHANNELS
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        from vlm.encoders.scan_backends.triton_kernels import backward_kernel

        u, delta, A, B, C, D, z, bias, directions, before = ctx.saved_tensors
        softplus, rows, channels = ctx.settings
        grid, sizes, blocks = _launch(u, B, rows, channels)
        batch, shares = u.shape[0], grid[0] // B.shape[2]
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_z = None if z is None else torch.empty_like(z)
        grad_A = u.new_empty(batch, *A.shape)
        grad_B, grad_C = u.new_empty(2, shares, *B.shape).unbind()
        grad_D, grad_bias = u.new_empty(2, batch, u.shape[2]).unbind()
        backward_kernel[grid](  # pyright: ignore[reportIndexIssue]
            (u, delta, u if z is None else z, B, C, A, D, bias, directions),
            (before, grads[0].contiguous(), grads[1].contiguous()),
            (grad_u, grad_delta, u if grad_z is None else grad_z),
            (grad_A, grad_B, grad_C, grad_D, grad_bias),
            sizes,
            SOFTPLUS=softplus,
            GATE=z is not None,
            **blocks,
        )
        return (
            *(grad_u, grad_delta, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0)),
            *(grad_D.sum(0), grad_z, grad_bias.sum(0), None, None),
        )


def _launch(
    u: Tensor, B: Tensor, rows: int, channels: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Return the grid, the sizes (L, D, G, N), and the sizes that are compiled in."""
    batch, length, width = u.shape
    groups, states = B.shape[2:]
    grid = (groups * -(-(width // groups) // channels), batch)
    padded = 1 << (states - 1).bit_length()
    blocks = {"STATES": padded, "T": rows, "W": channels, "num_warps": WARPS}
    return grid, (length, width, groups, states), blocks
