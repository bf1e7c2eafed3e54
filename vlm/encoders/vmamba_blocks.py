"""What does VMamba compute between pixels and the maps of its stages?

Shapes: B batch, S S' picture size, H W grid, L = H * W, D width, C = ratio * D inner channels,
K = 4 walks over the grid, N states a channel, R rank of the step's projection.

Sources: Liu et al. 2024 (arXiv 2401.10166); MzeroMiko/VMamba, vmamba.py. Names of weights are those
of the training code (classification/models/vmamba.py), which published files have.

Surprises:
- The reference is channels-first ("ln2d") or channels-last ("ln"); the numbers are the same. Here
  all is channels-last, and a convolution sees a transposed view.
- A stage's downsampling comes after its blocks, so a stage's output is the blocks'.
- Forward types "v0" and "v05" differ in kernels only; "_noz" has no gate.
- The oldest downsampling ("v1") pads an odd side by about the side itself in the reference, a slip;
  here by one, at the end, as Swin does. At the published size no side is odd there.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.encoders.cross_scan import REVERSE, Mode, inverse, join_walks, take_own, take_walks, walks
from vlm.encoders.drop_path import drop_path
from vlm.encoders.initial_weights import decay_logs, linear_weight, step_bias, step_weight
from vlm.encoders.selective_scan import selective_scan_channels_last

NUM_WALKS = 4


@dataclass(frozen=True, kw_only=True)
class VMambaArchitecture:
    """What fixes the weights' shapes; names as in the reference where it has one.

    `stem` is its patchembed_version: "v1" one convolution as wide as its stride, "v2" two 3 x 3.
    `downsample` is its downsample_version: "v1" joins 2 x 2 places, "v2" a 2 x 2, "v3" a 3 x 3
    convolution of stride 2.
    """

    depths: tuple[int, ...]  # blocks of each stage
    dims: tuple[int, ...]  # D of each stage
    ssm_ratio: float = 2.0  # C / D
    state_dim: int = 1  # N
    step_rank: int | None = None  # R; None: D / 16, rounded up
    conv_bias: bool = False  # of the depthwise convolution
    forward_type: Literal["v0", "v05", "v05_noz"] = "v05_noz"
    scan_mode: Mode = "cross"
    mlp_ratio: float = 4.0  # 0: no MLP
    patch_size: int = 4  # stride of the stem, pixels
    stem: Literal["v1", "v2"] = "v2"
    downsample: Literal["v1", "v2", "v3"] = "v3"


class SS2D(nn.Module):
    """Selective scan along four walks over the grid, (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim: int, a: VMambaArchitecture) -> None:
        """Draw new weights: those of the scan as Mamba does, the projections' as Swin does."""
        super().__init__()
        inner, rank = int(a.ssm_ratio * dim), a.step_rank or math.ceil(dim / 16)
        self.gated = a.forward_type != "v05_noz"
        self.sizes = [rank, a.state_dim, a.state_dim]
        self.reverse = REVERSE[a.scan_mode]
        self.in_proj = linear(dim, inner * (2 if self.gated else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=a.conv_bias)
        self.x_proj_weight = nn.Parameter(linear_weight(NUM_WALKS, sum(self.sizes), inner))
        self.dt_projs_weight = nn.Parameter(step_weight(NUM_WALKS, inner, rank))
        self.dt_projs_bias = nn.Parameter(step_bias(NUM_WALKS, inner))
        self.A_logs = nn.Parameter(decay_logs(NUM_WALKS * inner, a.state_dim))
        self.Ds = nn.Parameter(torch.ones(NUM_WALKS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = linear(inner, dim, bias=False)

    def no_weight_decay(self) -> set[str]:
        """Name the decays of the scan, which the reference marks so, and a bias of two axes."""
        return {"A_logs", "dt_projs_bias"}

    def forward(self, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """Mix places.

        Args:
            x: (B, H, W, D).
            order, back: (4, L), the walks over this grid and their inverses.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1) if self.gated else (self.in_proj(x), None)
        # A convolution of channels that lie innermost in memory; nothing is copied.
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.scan(x.flatten(1, 2), order, back).view_as(x)
        y = self.out_norm(y.to(x.dtype))
        return self.out_proj(y if z is None else y * F.silu(z))

    def scan(self, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """Return the sum over the walks of the scans of x, (B, L, C) -> (B, L, C)."""
        # Projections look at one place only: they come before the walks, on fewer channels.
        low = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (NUM_WALKS, -1))
        low, B, C = take_own(low, order, back).split(self.sizes, dim=-1)
        step = torch.einsum("blkr,kcr->blkc", low, self.dt_projs_weight)
        y = selective_scan_channels_last(
            take_walks(x, order, back).flatten(2),
            step.flatten(2),
            -self.A_logs.float().exp(),
            B,
            C,
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
            reverse=self.reverse,
        )
        assert isinstance(y, Tensor)
        return join_walks(y.unflatten(2, (NUM_WALKS, -1)), order, back)


class Mlp(nn.Module):
    """Two projections with GELU between, (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Draw new weights."""
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class VSSBlock(GradientCheckpointingLayer):
    """x + SS2D(norm(x)), then x + MLP(norm2(x)) where there is an MLP."""

    def __init__(self, dim: int, a: VMambaArchitecture, drop_rate: float) -> None:
        """Draw new weights."""
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, a)
        self.drop_rate = drop_rate
        self.has_mlp = a.mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, int(dim * a.mlp_ratio))

    def forward(self, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D); the walks as in `SS2D`."""
        mixed = self.op(self.norm(x), order, back)
        x = x + drop_path(mixed, self.drop_rate, self.training)
        if self.has_mlp:
            x = x + drop_path(self.mlp(self.norm2(x)), self.drop_rate, self.training)
        return x


class ChannelsLastConv(nn.Conv2d):
    """A convolution of (B, H, W, D), by a transposed view."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, H, W, D) -> (B, H', W', D')."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class JoinPlaces(nn.Module):
    """Put 2 x 2 places side by side, (B, H, W, D) -> (B, H/2, W/2, 4 D), column by column."""

    def forward(self, x: Tensor) -> Tensor:
        """An odd side is filled up with zeros at its end."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return torch.cat(corners, dim=-1)


class Stage(nn.Module):
    """Blocks, then the way to the next stage: `blocks`, `downsample` as published."""

    def __init__(self, blocks: list[VSSBlock], downsample: nn.Module, mode: Mode) -> None:
        """Take the parts."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.mode: Mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D), before the downsampling."""
        order = walks(self.mode, x.shape[1], x.shape[2], x.device)
        back = inverse(order)
        for block in self.blocks:
            x = block(x, order, back)
        return x


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a projection with weights as the reference draws them, after Swin."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def make_stem(a: VMambaArchitecture) -> nn.Sequential:
    """Return (B, S, S', 3) -> (B, H, W, D); the gaps keep the published numbering."""
    dim, size = a.dims[0], a.patch_size
    if a.stem == "v1":
        return nn.Sequential(ChannelsLastConv(3, dim, size, size), nn.Identity(), nn.LayerNorm(dim))
    half, stride = dim // 2, size // 2
    return nn.Sequential(
        ChannelsLastConv(3, half, stride + 1, stride, padding=1),
        nn.Identity(),
        nn.LayerNorm(half),
        nn.Identity(),
        nn.GELU(),
        ChannelsLastConv(half, dim, stride + 1, stride, padding=1),
        nn.Identity(),
        nn.LayerNorm(dim),
    )


def make_downsample(dim: int, out: int, version: str) -> nn.Sequential:
    """Return (B, H, W, D) -> (B, H', W', D'); the gaps keep the published numbering."""
    if version == "v1":
        return nn.Sequential(JoinPlaces(), nn.LayerNorm(4 * dim), linear(4 * dim, out, bias=False))
    kernel, padding = (2, 0) if version == "v2" else (3, 1)
    conv = ChannelsLastConv(dim, out, kernel, 2, padding)
    return nn.Sequential(nn.Identity(), conv, nn.Identity(), nn.LayerNorm(out))


def stem_side(side: int, a: VMambaArchitecture) -> int:
    """Return the side of the first stage's grid for a picture's side in pixels."""
    if a.stem == "v1":
        return side // a.patch_size
    stride = a.patch_size // 2
    for _ in range(2):
        side = (side + 2 - (stride + 1)) // stride + 1
    return side


def next_side(side: int, version: str) -> int:
    """Return the side of the next stage's grid."""
    return side // 2 if version == "v2" else (side + 1) // 2
