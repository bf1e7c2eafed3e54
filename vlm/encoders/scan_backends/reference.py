"""What is a selective scan, step by step? The plain loop that the other backends are held against.

Shapes: B batch, L sequence, D channels, G groups, N states.
Source: Mamba (arXiv 2312.00752), Algorithm 2; `selective_scan_ref` of state-spaces/mamba
(mamba_ssm/ops/selective_scan_interface.py). Autograd keeps every state:
for tests, not for training.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.encoders.scan_backends.problem import ScanProblem


def missing(p: ScanProblem) -> str:
    """Return "": it runs anywhere."""
    return ""


def scan(p: ScanProblem) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the last state (B, D, N); any floating type, any device."""
    batch, _, channels = p.u.shape
    bias = 0 if p.delta_bias is None else p.delta_bias
    step = F.softplus(p.delta + bias) if p.softplus else p.delta + bias
    B, C = (_per_channel(x, p) for x in (p.B, p.C))
    u, step, B, C = (in_scan_order(x, p.reverse) for x in (p.u, step, B, C))

    state = p.u.new_zeros(batch, channels, p.A.shape[1])
    outputs = []
    # Views made at once: the gradient of each slice x[:, t] would be a whole x of zeros.
    for step_t, u_t, B_t, C_t in zip(*(x.unbind(1) for x in (step, u, B, C)), strict=True):
        decay = torch.exp(step_t[..., None] * p.A)
        state = decay * state + (step_t * u_t)[..., None] * B_t
        outputs.append((C_t * state).sum(-1))
    y = in_scan_order(torch.stack(outputs, dim=1), p.reverse)
    if p.D is not None:
        y = y + p.D * p.u
    return (y if p.z is None else y * F.silu(p.z)), state


def _per_channel(x: Tensor, p: ScanProblem) -> Tensor:
    """(B, L, G, N) or (D, N) -> (B, L, D, N)."""
    if x.ndim == 2:
        return x.expand(*p.u.shape[:2], -1, -1)
    return x.repeat_interleave(p.u.shape[2] // x.shape[2], dim=2)


def in_scan_order(x: Tensor, reverse: tuple[bool, ...]) -> Tensor:
    """Flip (B, L, D, ...) along the sequence in the groups that are reversed; its own inverse."""
    parts = x.chunk(len(reverse), dim=2)
    return torch.cat(
        [part.flip(1) if flip else part for part, flip in zip(parts, reverse, strict=True)], dim=2
    )
