"""What does Vision-LSTM (ViL) compute between pixels and tokens?

Shapes: B batch, S S' picture size, H W grid, L = H * W tokens, D width, E = 2 D inner channels, M
heads of the matrix LSTM, J blocks of the block-diagonal projections.

Sources: Alkin et al. 2024 (arXiv 2406.04303); NX-AI/vision-lstm, `vision_lstm/vision_lstm.py`
(version 1) and `vision_lstm2.py` (version 2). Names of weights are those of these two files.

Surprises:
- Version 1 counts blocks, which look forward and backward by turns; version 2 counts pairs of both.
- A backward block turns the whole sequence round, so that its 2-D convolution sees the picture
  upside down and mirrored.
- `qkv_block_size` of the reference is two numbers at once: the width of the blocks of the q, k, v
  projections (J = E / 4 of them) and the number of heads M of the cell. Both are 4.
- A norm's weight is stored less 1, except that of version 1's last norm.
- Version 1 ends with two norms in a row when `legacy_norm` is set, as in all its published weights.
  Version 2's `legacy_norm` belongs to the classifier (it norms the two corner tokens side by side).
- With drop path the reference leaves out a fixed share of a batch, here each sample by itself is
  left out as often. Its rate is the same for all blocks unless `drop_path_decay` is set.
- At stride 8 the reference stores positions for a grid of 16-pixel patches and resizes them in
  every forward pass; so does this file for any other size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.encoders.drop_path import drop_path
from vlm.encoders.mlstm import mlstm
from vlm.encoders.position_resize import resize_positions
from vlm.encoders.vim_blocks import PatchEmbedding
from vlm.encoders.vim_mixer import look_back

Version = Literal[1, 2]
Grid = tuple[int, int]

EXPAND, HEADS, PROJECTION_WIDTH = 2, 4, 4
CONV_TAPS: dict[Version, int] = {1: 4, 2: 3}  # of the causal one, of a side of the 2-D one
NORM_EPS, LAST_NORM_EPS = 1e-5, 1e-6


@dataclass(frozen=True, kw_only=True)
class ViLArchitecture:
    """What fixes the shapes of the weights; None means: computed from the others."""

    dim: int  # D, a multiple of 2
    depth: int  # version 1: blocks; version 2: pairs of a forward and a backward one
    version: Version = 2  # 1: causal convolution, no biases; 2: 2-D convolution, biases
    patch_size: int = 16
    stride: int | None = None  # pixels between patches; None: patch_size
    position_grid: tuple[int, int] | None = None  # of the stored positions; None: image_size's
    legacy_norm: bool = True  # version 1: whether a norm stands before the last one


class OffsetNorm(nn.Module):
    """A layer norm over each of `groups` parts of the last axis, its weight stored less 1."""

    def __init__(self, dim: int, bias: bool, eps: float = NORM_EPS, groups: int = 1) -> None:
        """Begin with a weight of 1, stored as 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.groups == 1:
            return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)
        parts = x.unflatten(-1, (self.groups, -1))
        x = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * (1 + self.weight)
        return x if self.bias is None else x + self.bias


class BlockDiagonalLinear(nn.Module):
    """A projection of each `PROJECTION_WIDTH` neighbouring channels by themselves."""

    def __init__(self, channels: int, bias: bool, deviation: float) -> None:
        """Draw the weights from a normal distribution."""
        super().__init__()
        width = PROJECTION_WIDTH
        self.weight = nn.Parameter(torch.empty(channels // width, width, width))
        nn.init.normal_(self.weight, std=deviation)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        parts = x.unflatten(-1, (-1, PROJECTION_WIDTH))
        x = torch.einsum("bljd,jcd->bljc", parts, self.weight).flatten(2)
        return x if self.bias is None else x + self.bias


class Cell(nn.Module):
    """The matrix LSTM with its gates and norm: q, k, v (B, L, E) -> (B, L, E)."""

    def __init__(self, channels: int, norm_bias: bool) -> None:
        """Begin with gates that do not depend on the input: they forget little."""
        super().__init__()
        self.igate = nn.Linear(3 * channels, HEADS)
        self.fgate = nn.Linear(3 * channels, HEADS)
        self.outnorm = OffsetNorm(channels, norm_bias, groups=HEADS)
        nn.init.zeros_(self.igate.weight)
        nn.init.zeros_(self.fgate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, L, E) three times -> (B, L, E)."""
        x = torch.cat([q, k, v], dim=-1)
        heads = [t.unflatten(-1, (HEADS, -1)) for t in (q, k, v)]
        h, _ = mlstm(heads[0], heads[1], heads[2], self.igate(x), self.fgate(x))
        return self.outnorm(h.flatten(2))


class Layer(nn.Module):
    """Expansion, convolution, matrix LSTM, gate: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, version: Version) -> None:
        """Draw new weights; deviations as the reference ("small" and "wang")."""
        super().__init__()
        inner, biased, taps = EXPAND * dim, version == 2, CONV_TAPS[version]
        small = (2 / (5 * dim)) ** 0.5
        self.proj_up = nn.Linear(dim, 2 * inner, bias=biased)
        self.q_proj = BlockDiagonalLinear(inner, biased, small)
        self.k_proj = BlockDiagonalLinear(inner, biased, small)
        self.v_proj = BlockDiagonalLinear(inner, biased, small)
        self.version = version
        if version == 2:
            self.conv = nn.Conv2d(inner, inner, taps, padding=taps // 2, groups=inner)
        else:
            self.conv1d = nn.ModuleDict({"conv": nn.Conv1d(inner, inner, taps, groups=inner)})
        self.mlstm_cell = Cell(inner, norm_bias=biased)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, dim, bias=biased)
        nn.init.normal_(self.proj_up.weight, std=small)
        nn.init.normal_(self.proj_down.weight, std=2 / dim**0.5)
        if biased:
            nn.init.zeros_(self.proj_up.bias)
            nn.init.zeros_(self.proj_down.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, L, D) -> (B, L, D); `grid` is (H, W)."""
        x, z = self.proj_up(x).chunk(2, dim=-1)
        mixed = F.silu(self._convolve(x, grid))
        h = self.mlstm_cell(self.q_proj(mixed), self.k_proj(mixed), self.v_proj(x))
        return self.proj_down((h + self.learnable_skip * mixed) * F.silu(z))

    def _convolve(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, L, E) -> (B, L, E): on the grid, or along the sequence from its start."""
        if self.version == 1:
            conv = self.conv1d["conv"]
            assert isinstance(conv, nn.Conv1d)
            return look_back(x, conv)
        picture = x.unflatten(1, grid).permute(0, 3, 1, 2)
        return self.conv(picture).permute(0, 2, 3, 1).flatten(1, 2)


class Block(GradientCheckpointingLayer):
    """x + drop_path(layer(norm(x))), from the top left or from the bottom right."""

    def __init__(self, dim: int, version: Version, backward: bool, drop_rate: float) -> None:
        """Draw new weights."""
        super().__init__()
        self.norm = OffsetNorm(dim, bias=version == 2)
        self.layer = Layer(dim, version)
        self.backward, self.drop_rate = backward, drop_rate

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        h = self.norm(x)
        h = self.layer(h.flip(1), grid).flip(1) if self.backward else self.layer(h, grid)
        return x + drop_path(h, self.drop_rate, self.training)


class Pair(nn.Module):
    """A forward block, then a backward one."""

    def __init__(self, dim: int, version: Version, drop_rate: float) -> None:
        """Draw new weights."""
        super().__init__()
        self.rowwise_from_top_left = Block(dim, version, False, drop_rate)
        self.rowwise_from_bot_right = Block(dim, version, True, drop_rate)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.rowwise_from_bot_right(self.rowwise_from_top_left(x, grid), grid)


class Positions(nn.Module):
    """A learned vector for each place of a grid, resized bicubically to other grids."""

    def __init__(self, grid: Grid, dim: int) -> None:
        """Draw new weights."""
        super().__init__()
        self.embed = nn.Parameter(torch.empty(1, *grid, dim))
        nn.init.trunc_normal_(self.embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name the positions, as the reference does."""
        return {"embed"}

    def forward(self, grid: Grid) -> Tensor:
        """Return (1, L, D) for the grid (H, W)."""
        stored = (self.embed.shape[1], self.embed.shape[2])
        return resize_positions(self.embed.flatten(1, 2), stored, grid, "none", "middle")


class ViL(nn.Module):
    """ViL without its classifier; `forward` gives the feature maps of the layers asked for.

    Attributes:
        norm, legacy_norm: the last norms, None where nobody asked for them.
    """

    def __init__(
        self,
        architecture: ViLArchitecture,
        layers: Sequence[int],
        normed: bool,
        drop_path_rate: float = 0.0,
    ) -> None:
        """Draw new weights.

        Args:
            architecture: with stride and position grid; its depth counts blocks that are not built.
            layers: blocks (pairs) asked for, negative, from the end; later ones are not built.
            normed: whether the features asked for go through the last norms.
            drop_path_rate: of every block, in training.
        """
        super().__init__()
        a = architecture
        assert a.stride is not None and a.position_grid is not None, a
        self.entries = [a.depth + layer for layer in layers]
        self.patch_embed = PatchEmbedding(a.dim, a.patch_size, a.stride)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: in place
        self.pos_embed = Positions(a.position_grid, a.dim)
        rate = drop_path_rate
        blocks = [
            Pair(a.dim, 2, rate) if a.version == 2 else Block(a.dim, 1, i % 2 == 1, rate)
            for i in range(max(self.entries) + 1)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = self.legacy_norm = None
        if normed and a.version == 2:
            self.norm = OffsetNorm(a.dim, bias=True, eps=LAST_NORM_EPS)
        elif normed:
            self.norm = nn.LayerNorm(a.dim, eps=LAST_NORM_EPS)
            self.legacy_norm = OffsetNorm(a.dim, bias=False) if a.legacy_norm else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return feature maps (B, H, W, D) of images (B, 3, S, S')."""
        x = self.patch_embed(images)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2) + self.pos_embed(grid)
        states = []
        for block in self.blocks:
            x = block(x, grid)
            states.append(x)
        return [self._finish(states[entry]).unflatten(1, grid) for entry in self.entries]

    def _finish(self, x: Tensor) -> Tensor:
        """Return x (B, L, D) through the last norms."""
        if self.legacy_norm is not None:
            x = self.legacy_norm(x)
        return x if self.norm is None else self.norm(x)
