"""How do several encoders become one grid of tokens? Cambrian's Spatial Vision Aggregator (SVA).

Shapes: T views, H_i W_i feature grid and D_i width of map i, V sampler width, G query groups,
N tokens per view, E language-model width.

Each map is projected to V. Every query group lays a grid of queries over the view; a query sees
the window of each map that lies under it, and a context, the mean of the first map. The groups'
grids are resized to the token grid and joined on channels; an MLP projects them to E.
Surprises:
- Where the tiling pads views, queries do not see the padding; a window of padding alone is seen
  whole. Cambrian-1 also leaves such tokens out of the sequence: `tiling: {type: pad, unpad: true}`.
- All queries of a group begin as one learned vector: where they are is known from windows alone.
- All maps are projected through `windows` times the token grid, so encoders whose grids are no
  multiples of it have to be resized (`vision_encoder: {type: several, resize_to: [24, 96]}`).
- `vision_query` begins with deviation 1 / sqrt(E), not 1 / sqrt(V): cambrian_arch.py takes the
  language model's width.

Follows `cambrian/model/cambrian_arch.py` of cambrian-mllm/cambrian; section 3 of arXiv:2406.16860.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.base import Connector, ConnectorConfig
from connectors.errors import UserError
from connectors.sva_blocks import Kind, Masks, Sampler, cut_masks, cut_windows
from connectors.sva_keys import map_projector_keys, sampler_keys
from connectors.views import NOTHING_KNOWN, Reading, Views


@dataclass(frozen=True, kw_only=True)
class SVAConfig(ConnectorConfig):
    """What each token sees of each map, and how often it looks.

    Cambrian-1's four encoders, 24 x 24, 24 x 24, 24 x 24 and 96 x 96: `windows: [1, 1, 1, 4]`.
    """

    windows: tuple[int, ...] = ()  # side of the window of each map; (): 1 for each
    # One group each; the queries of group j stand n x n tokens apart. Published: one group, (1,).
    query_strides: tuple[int, ...] = (1,)
    depth: int = 3  # layers of each group's sampler
    hidden_dim: int = 1024  # V
    num_heads: int = 16
    kind: Kind = "joint"  # "separate" weights the maps; see sva_blocks.py

    def __post_init__(self) -> None:
        if not self.query_strides or min(*self.windows, *self.query_strides, self.depth) < 1:
            raise UserError(
                "connector 'sva': windows, query_strides and depth must be at least 1, not "
                f"{self.windows}, {self.query_strides} and {self.depth}"
            )
        if self.num_heads < 1 or self.hidden_dim % self.num_heads:
            raise UserError(
                f"connector 'sva': hidden_dim {self.hidden_dim} is no multiple of num_heads "
                f"{self.num_heads}; choose another of the two"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the first map's grid divided by its window.

        Raises:
            UserError: the window, or a query stride, does not divide the grid.
        """
        first = self.windows[0] if self.windows else 1
        rows, columns = height // first, width // first
        for stride in self.query_strides:
            if height % (first * stride) or width % (first * stride):
                raise UserError(
                    f"connector 'sva': window {first} and query stride {stride} do not divide the "
                    f"first feature grid {height} x {width}; choose other windows or query_strides"
                )
        return rows, columns


class Seen(NamedTuple):
    """What samplers inside the language model read: for each token of every view, row-major."""

    context: Tensor  # (T * N, 1, V)
    windows: list[Tensor]  # (T * N, R_i * R_i, V) of each map
    masks: list[Tensor] | None  # (T * N, R_i * R_i), True where it may look


class SVAConnector(Connector[SVAConfig]):
    """Samplers over several encoders' maps; one token per place of the token grid."""

    config_class = SVAConfig

    def __init__(self, config: SVAConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.windows = config.windows or (1,) * len(vision_dims)
        if len(self.windows) != len(vision_dims):
            raise UserError(
                f"connector 'sva': windows has {len(self.windows)} numbers, but the vision encoder "
                f"gives {len(vision_dims)} feature maps; give one for each"
            )
        if config.kind == "separate" and len(vision_dims) == 1:
            raise UserError(
                "connector 'sva': kind 'separate' weights several feature maps, but the vision "
                "encoder gives one; choose kind 'joint' or several encoders"
            )
        v = config.hidden_dim
        self.map_projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(d, v), nn.GELU(), nn.Linear(v, v), nn.LayerNorm(v))
            for d in vision_dims
        )
        groups = len(config.query_strides)
        self.vision_query = nn.Parameter(torch.randn(groups, v) * text_dim**-0.5)
        self.samplers = nn.ModuleList(
            Sampler(v, v, self._group_windows(n), config.depth, config.num_heads, config.kind)
            for n in config.query_strides
        )
        self.projector = nn.Sequential(
            nn.Linear(v * groups, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim)
        )

    def project(self, features: Sequence[Tensor], valid: Masks = None) -> Tensor:
        """Map feature maps (T, H_i, W_i, D_i) to tokens (T, N, E).

        Args:
            features: one map per encoder, each `windows` times the token grid.
            valid: (T, H_i, W_i) bool of each map, False where the view is padding; None: the whole
                view.

        Raises:
            UserError: the maps' grids do not fit the windows.
        """
        return self.project_from(self.project_maps(features), valid)

    @property
    def reads(self) -> frozenset[Reading]:
        """Return that queries look past what pads a view."""
        return frozenset({"padding"})

    def forward(self, features: Sequence[Tensor], views: Views = NOTHING_KNOWN) -> Tensor:
        """Same as `project`, without what pads the views."""
        return self.project(features, views.shown)

    def project_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps (T, H_i, W_i, D_i) as (T, H_i, W_i, V).

        Raises:
            UserError: the maps' grids do not fit the windows.
        """
        assert [f.shape[-1] for f in features] == list(self.vision_dims)
        rows, columns = self.token_grid(*features[0].shape[1:3])
        grids = [tuple(f.shape[1:3]) for f in features]
        if grids != [(rows * n, columns * n) for n in self.windows]:
            given = ", ".join(map(str, grids))
            raise UserError(
                f"connector 'sva': the vision encoder gives feature grids {given}, which are not "
                f"windows {list(self.windows)} times one token grid; set connector.windows, or "
                "vision_encoder.resize_to"
            )
        return [project(f) for project, f in zip(self.map_projectors, features, strict=True)]

    def project_from(self, maps: Sequence[Tensor], valid: Masks) -> Tensor:
        """Return tokens (T, N, E) of projected maps; the rest as `project` has it."""
        height, width = (n // self.windows[0] for n in maps[0].shape[1:3])
        strides = self.config.query_strides
        groups = [self._sample(j, maps, valid, (height, width)) for j in range(len(strides))]
        return self.projector(torch.cat(groups, dim=-1)).flatten(1, 2)

    def look(self, maps: Sequence[Tensor], valid: Masks = None, stride: int = 1) -> Seen:
        """Return what queries that stand `stride` tokens apart see of the projected maps.

        Args:
            maps: from `project_maps`.
            valid: as `project` has it.
            stride: 1 for the samplers inside the language model.
        """
        windows = self._group_windows(stride)
        cut = [cut_windows(x, side) for x, side in zip(maps, windows, strict=True)]
        masks = None
        if valid is not None:
            masks = [cut_masks(x, side) for x, side in zip(valid, windows, strict=True)]
        context = maps[0].mean((1, 2))[:, None]  # (T, 1, V)
        queries = (maps[0].shape[1] // windows[0]) * (maps[0].shape[2] // windows[0])
        return Seen(context.repeat_interleave(queries, dim=0), cut, masks)

    def _group_windows(self, stride: int) -> tuple[int, ...]:
        return tuple(side * stride for side in self.windows)

    def _sample(
        self, group: int, maps: Sequence[Tensor], valid: Masks, grid: tuple[int, int]
    ) -> Tensor:
        """Return what one query group finds, resized to the token grid: (T, rows, columns, V)."""
        stride = self.config.query_strides[group]
        seen = self.look(maps, valid, stride)
        queries = self.vision_query[group].expand_as(seen.context)
        found = self.samplers[group](queries, seen.context, seen.windows, seen.masks)
        found = found.reshape(-1, grid[0] // stride, grid[1] // stride, self.config.hidden_dim)
        if stride == 1:
            return found
        # In float32, as the reference does.
        resized = F.interpolate(found.permute(0, 3, 1, 2).float(), grid, mode="bilinear")
        return resized.permute(0, 2, 3, 1).to(found.dtype)

    @classmethod
    def key_tables(cls, config: SVAConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of Cambrian's checkpoints; `windows` has to be written out."""
        if not config.windows:
            return {}  # the number of maps decides which weights there are
        keys = {"vision_query": "vision_query"}
        for i in range(len(config.windows)):
            keys |= map_projector_keys(f"mm_projector_aux_{i}.", f"map_projectors.{i}.")
        for j, stride in enumerate(config.query_strides):
            sides = [side * stride for side in config.windows]
            theirs, ours = f"vision_sampler_{j}.", f"samplers.{j}."
            keys |= sampler_keys(theirs, ours, sides, config.depth, config.kind)
        names = ("weight", "bias")
        keys |= {f"mm_projector.{i}.{n}": f"projector.{i}.{n}" for i in (0, 2) for n in names}
        return {"cambrian": keys}
