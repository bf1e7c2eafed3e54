"""How does Vim's Mamba mixer look at a sequence from both ends?

Shapes: B batch, L sequence, D width, E = expand * D inner channels, N states a channel, R rank of
the step's projection.

Sources: Zhu et al. 2024 (arXiv 2401.09417), algorithm 1; hustvl/Vim,
mamba-1p1p1/mamba_ssm/modules/mamba_simple.py; Gu and Dao 2023 (arXiv 2312.00752) for one direction.

Surprises:
- The reference flips the sequence, computes forwards and flips back. Here the backward direction's
  convolution looks ahead and its scan runs from the end, both directions side by side in one call.
- Both directions are gated by the same z in the reference; here their sum is, once.
- "v1" has one convolution and one projection for both directions and only its own decays; its
  skip D * x is therefore added twice.
- The reference draws a new model's backward step bias as zero (its generic initialisation spares
  `dt_proj.bias` only); here both directions begin as Mamba does.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.encoders.initial_weights import decay_logs, step_bias, step_weight
from vlm.encoders.selective_scan import selective_scan_channels_last

Directions = Literal["v2", "v1", "none"]


class StepProjection(nn.Module):
    """The projection of a low-rank step R to E channels; the scan adds the bias, in float32.

    No `nn.Linear`: an adapter such as LoRA on it would be ignored, as its weight is used directly.
    """

    def __init__(self, rank: int, channels: int) -> None:
        """Draw the weights as Mamba does."""
        super().__init__()
        self.weight = nn.Parameter(step_weight(channels, rank))
        self.bias = nn.Parameter(step_bias(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., R) -> (..., E), without the bias."""
        return F.linear(x, self.weight)


class MambaMixer(nn.Module):
    """Mamba's mixer in one direction ("none") or both ("v1", "v2"), (B, L, D) -> (B, L, D)."""

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        step_rank: int | None = None,
        directions: Directions = "v2",
        divide_out: bool = True,
        layer_scale: float | None = None,
        out_gain: float = 1.0,
    ) -> None:
        """Draw new weights.

        Args:
            dim: D.
            state_dim: N.
            conv_width: taps of the depthwise convolution.
            expand: E / D.
            step_rank: R; None: D / 16, rounded up.
            directions: the reference's `bimamba_type`.
            divide_out: whether the two directions of "v2" are averaged, not added.
            layer_scale: first value of the per-channel factor `gamma` of the output; None: none.
            out_gain: what the new output projection is multiplied by.
        """
        super().__init__()
        inner = expand * dim
        self.rank = math.ceil(dim / 16) if step_rank is None else step_rank
        self.state_dim, self.directions = state_dim, directions
        self.out_scale = 0.5 if directions == "v2" and divide_out else 1.0
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_gain)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state_dim, bias=False)
        self.dt_proj = StepProjection(self.rank, inner)
        self.A_log = nn.Parameter(decay_logs(inner, state_dim))
        self.D = nn.Parameter(torch.ones(inner))
        if directions != "none":
            self.A_b_log = nn.Parameter(decay_logs(inner, state_dim))
        if directions == "v2":
            self.conv1d_b = nn.Conv1d(inner, inner, conv_width, groups=inner)
            self.x_proj_b = nn.Linear(inner, self.rank + 2 * state_dim, bias=False)
            self.dt_proj_b = StepProjection(self.rank, inner)
            self.D_b = nn.Parameter(torch.ones(inner))
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale))

    def no_weight_decay(self) -> set[str]:
        """Name the decays of the scan, which the reference marks so."""
        return {"A_log", "A_b_log"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self._scan_v2(x) if self.directions == "v2" else self._scan_shared(x)
        y = self.out_proj(y * (F.silu(z) * self.out_scale))
        return y if self.gamma is None else y * self.gamma

    def _scan_v2(self, x: Tensor) -> Tensor:
        """Return the sum (B, L, E) of both directions' scans of x (B, L, E)."""
        forward = F.silu(look_back(x, self.conv1d))
        backward = F.silu(look_ahead(x, self.conv1d_b))
        step, B, C = self._project(forward, self.x_proj, self.dt_proj)
        step_b, B_b, C_b = self._project(backward, self.x_proj_b, self.dt_proj_b)
        return _sum_halves(
            _scan(
                torch.cat([forward, backward], dim=-1),
                torch.cat([step, step_b], dim=-1),
                torch.cat([self.A_log, self.A_b_log]),
                torch.stack([B, B_b], dim=2),
                torch.stack([C, C_b], dim=2),
                torch.cat([self.D, self.D_b]),
                torch.cat([self.dt_proj.bias, self.dt_proj_b.bias]),
                reverse=(False, True),
            )
        )

    def _scan_shared(self, x: Tensor) -> Tensor:
        """Return the scan (B, L, E), with "v1" the sum of both directions' scans."""
        x = F.silu(look_back(x, self.conv1d))
        step, B, C = self._project(x, self.x_proj, self.dt_proj)
        B, C = B[:, :, None], C[:, :, None]
        bias = self.dt_proj.bias
        if self.directions == "none":
            return _scan(x, step, self.A_log, B, C, self.D, bias, reverse=(False,))
        x, step = torch.cat([x, x], dim=-1), torch.cat([step, step], dim=-1)
        logs = torch.cat([self.A_log, self.A_b_log])
        skip, bias = torch.cat([self.D, self.D]), torch.cat([bias, bias])
        return _sum_halves(_scan(x, step, logs, B, C, skip, bias, reverse=(False, True)))

    def _project(
        self, x: Tensor, project: nn.Module, to_step: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return step (B, L, E), B (B, L, N) and C (B, L, N) of x (B, L, E)."""
        sizes = [self.rank, self.state_dim, self.state_dim]
        step, B, C = project(x).split(sizes, dim=-1)
        return to_step(step), B, C


def look_back(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Return a causal depthwise convolution of x (B, L, E), same shape: each step sees earlier."""
    return _convolve(F.pad(x, (0, 0, conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias)


def look_ahead(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Return what `look_back` gives on the flipped sequence, flipped back."""
    padded = F.pad(x, (0, 0, 0, conv.kernel_size[0] - 1))
    return _convolve(padded, conv.weight.flip(-1), conv.bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L + taps - 1, E), (E, 1, taps) -> (B, L, E).

    As an image of one row whose channels lie innermost in memory, so that nothing is transposed.
    """
    row = x.transpose(1, 2).unsqueeze(2)  # (B, E, 1, L + taps - 1)
    y = F.conv2d(row, weight.unsqueeze(2), bias, groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2)


def _scan(
    x: Tensor,
    step: Tensor,
    decay_logs: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    step_bias: Tensor,
    reverse: tuple[bool, ...],
) -> Tensor:
    """Scan x, step (B, L, c) with decay logs (c, N), B and C (B, L, G, N), skip and bias (c)."""
    y = selective_scan_channels_last(
        x,
        step,
        -decay_logs.float().exp(),
        B,
        C,
        skip,
        delta_bias=step_bias,
        delta_softplus=True,
        reverse=reverse,
    )
    assert isinstance(y, Tensor)
    return y


def _sum_halves(y: Tensor) -> Tensor:
    """(B, L, 2 E) -> (B, L, E)."""
    first, second = y.chunk(2, dim=-1)
    return first + second
