"""What if every weight of a linear connector were a curve? A Kolmogorov-Arnold layer (KAN).

Shapes: T views, H W feature grid, D encoder width, N = H * W tokens per view, E language-model
width, G intervals of the grid, P order of the splines, C = G + P basis functions.

Token e is the sum over features d of scale_base[d, e] silu(x_d) + scale_spline[d, e] s_de(x_d),
where s_de is a spline on the grid: D * E * (G + P + 2) weights.
Surprises:
- A spline lives on its grid alone; features have to be brought there, so they are normed first.
  Outside, `silu` remains.
- The basis takes C numbers for each feature. Rows go through it in chunks, and the backward pass
  computes it again instead of keeping it.
- No published vision-language model has it; the table's keys are those of a pykan model.

Follows `kan/KANLayer.py` of KindXiaoming/pykan; section 2 of arXiv:2404.19756.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.errors import UserError
from connectors.float32 import Float32Module
from connectors.spline import (
    add_outer_knots,
    interpolate_grid,
    refit,
    sample_grid,
    spline_basis,
    uniform_grid,
)

CHUNK_ROWS = 1024  # features that go through the basis at a time


@dataclass(frozen=True, kw_only=True)
class KANConfig(ConnectorConfig):
    """The grid, the order of the splines, and what brings features onto the grid."""

    intervals: int = 5  # G; `KANConnector.extended` raises it
    order: int = 3  # P
    low: float = -1.0  # first point of the grid
    high: float = 1.0  # last point of the grid
    norm: Literal["layer", "tanh", "none"] = "layer"
    noise: float = 0.5  # height of the curves at the beginning, times G (pykan's `noise_scale`)

    def __post_init__(self) -> None:
        if self.intervals < 1 or self.order < 1 or not self.low < self.high:
            raise UserError(
                "connector 'kan': intervals and order must be at least 1 and low below high, not "
                f"{self.intervals}, {self.order}, {self.low} and {self.high}"
            )


class Knots(Float32Module):
    """The knots of every input; in float32, where half precision would move a fine grid's."""

    grid: Tensor

    def __init__(self, grid: Tensor, order: int) -> None:
        """Keep the knots (D, G + 2 P + 1) as a buffer: samples move them, an optimiser does not."""
        super().__init__()
        self.order = order
        self.register_buffer("grid", grid)

    def inner(self) -> Tensor:
        """Return the points of the grid itself, (D, G + 1)."""
        return self.grid[:, self.order : self.grid.shape[1] - self.order]

    def forward(self, x: Tensor) -> Tensor:
        """Return the basis functions (M, D, C) at (M, D)."""
        return spline_basis(x.float(), self.grid, self.order).to(x.dtype)


class KANLayer(nn.Module):
    """A curve from every input to every output."""

    mask: Tensor

    def __init__(self, config: KANConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        g, p = config.intervals, config.order
        points = uniform_grid(config.low, config.high, g)
        knots = add_outer_knots(points[None], p)
        self.knots = Knots(knots.repeat(in_dim, 1), p)
        self.coef = nn.Parameter(torch.zeros(in_dim, out_dim, g + p))
        if not self.coef.is_meta:
            # The smallest coefficients whose curves go through noise at the points of the grid.
            basis = spline_basis(points[:, None], knots, p)[:, 0]  # (G + 1, C)
            heights = (torch.rand(in_dim, out_dim, g + 1) - 0.5) * config.noise / g
            self.coef.data.copy_(heights @ torch.linalg.pinv(basis).T)
        self.scale_base = nn.Parameter((torch.rand(in_dim, out_dim) * 2 - 1) * in_dim**-0.5)
        self.scale_spline = nn.Parameter(torch.full((in_dim, out_dim), in_dim**-0.5))
        # 0 takes a curve out, as pruning does.
        self.register_buffer("mask", torch.ones(in_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., E)."""
        rows = x.flatten(0, -2)
        base = F.silu(rows) @ (self.scale_base * self.mask)
        curves = self.coef * (self.scale_spline * self.mask)[..., None]
        weight = curves.transpose(1, 2).flatten(0, 1)  # (D * C, E)
        if len(rows) <= CHUNK_ROWS or not torch.is_grad_enabled():
            parts = [self._splines(part, weight) for part in rows.split(CHUNK_ROWS)]
        else:
            parts = [
                checkpoint(self._splines, part, weight, use_reentrant=False)
                for part in rows.split(CHUNK_ROWS)
            ]
        return (base + torch.cat(parts)).unflatten(0, x.shape[:-1])

    def _splines(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return the splines' share (M, E) at (M, D)."""
        return self.knots(rows).flatten(1) @ weight

    @torch.no_grad()
    def regrid(self, grid: Tensor, points: Tensor) -> None:
        """Move to another grid (D, G' + 1); the curves stay as they are at points (M, D)."""
        order = self.knots.order
        knots = add_outer_knots(grid, order)
        coef = refit(self.coef, points, self.knots.grid, knots, order)
        self.knots.grid = knots
        self.coef = nn.Parameter(coef, requires_grad=self.coef.requires_grad)


class KANConnector(Connector[KANConfig]):
    """Features are normed and go through one KAN layer; one token per feature."""

    config_class = KANConfig

    def __init__(self, config: KANConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        dim = sum(vision_dims)
        norms = {"layer": nn.LayerNorm(dim), "tanh": nn.Tanh(), "none": nn.Identity()}
        self.norm = norms[config.norm]
        self.layer = KANLayer(config, dim, text_dim)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, H * W, E)."""
        return self.layer(self.norm(join_channels(features, self.vision_dims))).flatten(1, 2)

    def extended(self, intervals: int, features: Sequence[Tensor] | None = None) -> Self:
        """Return a connector of the same curves on a finer grid, to train further.

        Args:
            intervals: of the new grid, which spans the same range.
            features: maps (T, H, W, D_i) whose values the curves are fitted at, as pykan does;
                None: evenly all over the grid.

        Raises:
            UserError: the new grid is no finer, or there are too few features to fit its curves.
        """
        old = self.layer.knots.inner()
        if intervals <= self.config.intervals:
            raise UserError(
                f"connector 'kan': {intervals} intervals are no extension of the "
                f"{self.config.intervals} there are; give more"
            )
        grid = interpolate_grid(old, intervals)
        points = interpolate_grid(old, 8 * intervals).T if features is None else self._at(features)
        self._check(points, intervals)
        finer = replace(self.config, intervals=intervals)
        extended = type(self)(finer, self.vision_dims, self.text_dim).to(self.layer.coef)
        own = self.state_dict()
        kept = {name for name in own if name not in ("layer.coef", "layer.knots.grid")}
        extended.load_state_dict({name: own[name] for name in kept}, strict=False)
        extended.layer.knots.grid = self.layer.knots.grid
        extended.layer.coef.data = self.layer.coef.detach()
        extended.layer.regrid(grid, points)
        return extended.train(self.training)

    def fit_grid(self, features: Sequence[Tensor], uniform_share: float = 0.02) -> None:
        """Move the grid to where features are, about as many in each interval; curves stay.

        Args:
            features: maps (T, H, W, D_i).
            uniform_share: of an even grid, mixed in.

        Raises:
            UserError: there are too few features to fit the curves.
        """
        points = self._at(features)
        self._check(points, self.config.intervals)
        grid = sample_grid(points.float(), self.config.intervals, uniform_share)
        self.layer.regrid(grid, points)

    @torch.no_grad()
    def _at(self, features: Sequence[Tensor]) -> Tensor:
        """Return what the layer gets for each feature, (T * H * W, D)."""
        return self.norm(join_channels(features, self.vision_dims)).flatten(0, 2)

    def _check(self, points: Tensor, intervals: int) -> None:
        """Refuse points that leave the curves open."""
        needed = intervals + self.config.order
        if len(points) < needed:
            raise UserError(
                f"connector 'kan': {len(points)} features cannot fix curves of {needed} "
                "coefficients; give more pictures"
            )

    @classmethod
    def key_tables(cls, config: KANConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of the first layer of a pykan model, where there is no norm to learn."""
        if config.norm == "layer":
            return {}
        names = {"grid": "knots.grid", "scale_sp": "scale_spline"}
        names |= {name: name for name in ("coef", "mask", "scale_base")}
        return {"pykan": {f"act_fun.0.{theirs}": f"layer.{ours}" for theirs, ours in names.items()}}
