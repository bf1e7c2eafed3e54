"""How does a query read several feature maps, each through a window of its own (Cambrian's SVA)?

Shapes: T views, H W feature grid, R side of a map's window, M queries of all views (T * rows *
columns), Q query width, V sampler width (every map has it), C = V context width.

Every query is a batch row of its own: it sees R_i x R_i positions of map i and nothing else of it.
The same layers serve before the language model (Q = V, learned queries) and inside it (Q = E, the
hidden states of image tokens).
Follows `cambrian/model/vision_sampler.py` of cambrian-mllm/cambrian.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from connectors.attention import attend

Kind = Literal["joint", "separate"]
Masks = Sequence[Tensor] | None


def cut_windows(features: Tensor, side: int) -> Tensor:
    """Cut a map (T, H, W, V) into windows (T * H/R * W/R, R * R, V), all of them row-major."""
    t, h, w, v = features.shape
    blocks = features.reshape(t, h // side, side, w // side, side, v).transpose(2, 3)
    return blocks.reshape(-1, side * side, v)


def cut_masks(valid: Tensor, side: int) -> Tensor:
    """Cut what may be seen of a map, (T, H, W) bool, into masks (T * H/R * W/R, R * R).

    A window of padding alone is seen whole: a softmax over nothing has no value.
    """
    masks = cut_windows(valid[..., None], side)[..., 0]
    return masks | ~masks.any(-1, keepdim=True)


class SamplerMLP(nn.Module):
    """Two linear layers without bias, GELU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=False)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        return self.linear_2(self.act(self.linear_1(x)))


class WindowPosition(nn.Module):
    """A learned vector for each place in a window; nothing for a window of one place."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(side**2, dim)) if side > 1 else None

    def forward(self, windows: Tensor) -> Tensor:
        """Add the vectors to windows (M, R * R, V)."""
        return windows if self.table is None else windows + self.table


class WindowAttention(nn.Module):
    """One softmax over the windows of all maps; each map has its own norms, keys and values."""

    def __init__(self, dim: int, num_maps: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = _normed_linear(dim)
        self.keys = nn.ModuleList(_normed_linear(dim) for _ in range(num_maps))
        self.values = nn.ModuleList(_normed_linear(dim) for _ in range(num_maps))
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, queries: Tensor, windows: Sequence[Tensor], masks: Masks) -> Tensor:
        """Return (M, 1, V) for queries (M, 1, V), windows (M, R_i^2, V), masks (M, R_i^2)."""
        keys = torch.cat([k(x) for k, x in zip(self.keys, windows, strict=True)], dim=1)
        values = torch.cat([v(x) for v, x in zip(self.values, windows, strict=True)], dim=1)
        mask = None if masks is None else torch.cat(list(masks), dim=1)
        return self.output(attend(self.query(queries), keys, values, self.num_heads, mask))


class SamplerLayer(nn.Module):
    """Query and context look into the windows; what they find is added to the query.

    Kinds (the reference's `layer_type`):
        "joint": one attention over all maps' windows; all published models.
        "separate" ("sep"): an attention per map, or an MLP where the window is one place, weighted
            by a softmax over the maps; there has to be more than one.
    """

    def __init__(
        self,
        query_dim: int,
        hidden_dim: int,
        windows: Sequence[int],
        num_heads: int = 16,
        kind: Kind = "joint",
    ) -> None:
        super().__init__()
        self.project_context = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.project_in = nn.Linear(query_dim + hidden_dim, hidden_dim, bias=False)
        self.positions = nn.ModuleList(WindowPosition(side, hidden_dim) for side in windows)
        self.joint = kind == "joint"
        if self.joint:
            self.attention = WindowAttention(hidden_dim, len(windows), num_heads)
        else:
            self.weigh = SamplerMLP(query_dim + hidden_dim, hidden_dim, len(windows))
            self.readers = nn.ModuleList(
                WindowAttention(hidden_dim, 1, num_heads)
                if side > 1
                else SamplerMLP(hidden_dim, hidden_dim, hidden_dim)
                for side in windows
            )
        self.norm = nn.LayerNorm(hidden_dim)
        self.project_out = SamplerMLP(hidden_dim, hidden_dim, query_dim)

    def forward(
        self, queries: Tensor, context: Tensor, windows: Sequence[Tensor], masks: Masks = None
    ) -> Tensor:
        """Return new queries (M, 1, Q).

        Args:
            queries: (M, 1, Q).
            context: (M, 1, V).
            windows: (M, R_i * R_i, V) of each map.
            masks: (M, R_i * R_i) of each map, True where the query may look; None: everywhere.
        """
        joined = torch.cat([queries, self.project_context(context)], dim=-1)
        inner = self.project_in(joined)
        placed = [at(x) for at, x in zip(self.positions, windows, strict=True)]
        if self.joint:
            found = self.attention(inner, placed, masks)
        else:
            found = self._read_each(joined, inner, placed, masks)
        return queries + self.project_out(self.norm(inner + found))

    def _read_each(
        self, joined: Tensor, inner: Tensor, windows: Sequence[Tensor], masks: Masks
    ) -> Tensor:
        """Return the weighted sum of what each map gives, (M, 1, V)."""
        weights = self.weigh(joined).softmax(-1)  # (M, 1, number of maps)
        found = []
        for i, (reader, window) in enumerate(zip(self.readers, windows, strict=True)):
            attends = isinstance(reader, WindowAttention)
            mask = None if masks is None else [masks[i]]
            found.append(reader(inner, [window], mask) if attends else reader(window))
        return (torch.stack(found, dim=-1) * weights[..., None, :]).sum(-1)


class Sampler(nn.Module):
    """Several layers, each reading the same windows."""

    def __init__(
        self,
        query_dim: int,
        hidden_dim: int,
        windows: Sequence[int],
        depth: int = 1,
        num_heads: int = 16,
        kind: Kind = "joint",
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            SamplerLayer(query_dim, hidden_dim, windows, num_heads, kind) for _ in range(depth)
        )

    def forward(
        self, queries: Tensor, context: Tensor, windows: Sequence[Tensor], masks: Masks = None
    ) -> Tensor:
        """Return queries (M, 1, Q) after all layers; arguments as `SamplerLayer` has them."""
        for layer in self.layers:
            queries = layer(queries, context, windows, masks)
        return queries


def _normed_linear(dim: int) -> nn.Sequential:
    """Return a norm and a linear layer without bias."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False))
