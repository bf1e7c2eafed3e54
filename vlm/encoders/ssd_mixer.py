"""How does Mamba-2's mixer look at a sequence from both ends, in place of Vim's?

Shapes: B batch, L sequence, D width, E = expand * D inner channels, H heads of P channels, G groups
of N states.

Sources: Dao and Gu 2024 (arXiv 2405.21060), section 7; the layer of
`transformers.models.mamba2.modeling_mamba2.Mamba2Mixer`, whose names of weights these are. With
directions "none" it is that layer. "v2" carries Vim's v2 over to it: the projections in and out are
shared, convolution, decay, step bias, skip and norm are each direction's own (names with `_b`), and
the directions are averaged. No published model has it.

Surprises:
- A head has one decay and one step for all its channels and states, where Mamba has one a channel
  and state; in return N is larger.
- x, B, C and the steps come from one projection; x, B and C go through the convolution together.
- The gate comes before the norm, so both directions are gated, each by the same z.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.encoders.initial_weights import step_bias
from vlm.encoders.ssd import ssd
from vlm.encoders.vim_mixer import look_ahead, look_back
from vlm.errors import UserError

Mamba2Directions = Literal["v2", "none"]


class GatedRMSNorm(nn.Module):
    """RMS norm of x * SiLU(z) in each of G groups of channels, computed in float32."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        """Begin with ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(..., E), (..., E) -> (..., E) in z's type."""
        gated = (x.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return normed.to(z.dtype) * self.weight


class Mamba2Mixer(nn.Module):
    """Mamba-2's mixer in one direction ("none") or both ("v2"), (B, L, D) -> (B, L, D)."""

    def __init__(
        self,
        dim: int,
        state_dim: int = 64,
        conv_width: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
        directions: Mamba2Directions = "v2",
        out_gain: float = 1.0,
        norm_eps: float = 1e-5,
    ) -> None:
        """Draw new weights.

        Args:
            dim: D.
            state_dim: N.
            conv_width: taps of the depthwise convolution.
            expand: E / D.
            head_dim: P, which divides E.
            groups: G, which divides H.
            directions: "v2" for both.
            out_gain: what the new output projection is multiplied by.
            norm_eps: of the gated norms.

        Raises:
            UserError: heads or groups do not divide the channels.
        """
        super().__init__()
        self.inner, self.head_dim, self.groups = expand * dim, head_dim, groups
        if min(head_dim, groups) < 1 or self.inner % (head_dim * groups):
            raise UserError(
                f"Mamba-2's mixer: heads of {head_dim} channels in {groups} groups do not divide "
                f"{self.inner} inner channels ({expand} x {dim}); change head_dim, groups or expand"
            )
        self.heads = self.inner // head_dim
        self.mixed = self.inner + 2 * groups * state_dim  # channels of x, B and C
        self.directions = directions
        self.in_proj = nn.Linear(dim, self.inner + self.mixed + self.heads, bias=False)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight *= out_gain
        self.conv1d = nn.Conv1d(self.mixed, self.mixed, conv_width, groups=self.mixed)
        self.dt_bias = nn.Parameter(step_bias(self.heads))
        self.A_log = nn.Parameter(decay_logs(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.inner, groups, norm_eps)
        if directions == "v2":
            self.conv1d_b = nn.Conv1d(self.mixed, self.mixed, conv_width, groups=self.mixed)
            self.dt_bias_b = nn.Parameter(step_bias(self.heads))
            self.A_b_log = nn.Parameter(decay_logs(self.heads))
            self.D_b = nn.Parameter(torch.ones(self.heads))
            self.norm_b = GatedRMSNorm(self.inner, groups, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        z, mixed, step = self.in_proj(x).split([self.inner, self.mixed, self.heads], dim=-1)
        steps = F.softplus(step.float() + self.dt_bias.float())
        y = self._scan(look_back(mixed, self.conv1d), steps, self.A_log, self.D, reverse=False)
        y = self.norm(y, z)
        if self.directions == "v2":
            steps = F.softplus(step.float() + self.dt_bias_b.float())
            mixed = look_ahead(mixed, self.conv1d_b)
            y_b = self._scan(mixed, steps, self.A_b_log, self.D_b, reverse=True)
            y = (y + self.norm_b(y_b, z)) * 0.5
        return self.out_proj(y)

    def _scan(
        self, mixed: Tensor, steps: Tensor, decay_log: Tensor, skip: Tensor, reverse: bool
    ) -> Tensor:
        """Return the scan (B, L, E) of the convolved x, B and C (B, L, E + 2 G N)."""
        states = self.mixed - self.inner
        x, B, C = F.silu(mixed).split([self.inner, states // 2, states // 2], dim=-1)
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        x = x.unflatten(-1, (self.heads, self.head_dim))
        A = -decay_log.float().exp()
        return ssd(x, steps, A, B, C, skip, reverse=reverse)[0].flatten(-2)


def decay_logs(heads: int) -> Tensor:
    """Return logs (H) of decay rates between 1 and 16, uniform.

    As `mamba_ssm/modules/mamba2.py` (from memory); transformers takes 1, 2, ..., H.
    """
    return torch.empty(heads).uniform_(1, 16).log()
