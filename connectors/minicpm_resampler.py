"""How does MiniCPM-V make few tokens of any grid? Queries read it once, by position.

Shapes: T views, H W feature grid, K = H * W features, D encoder width, Q queries, N = Q tokens per
view, E language-model width.

One cross-attention without a residual path or feed-forward layer: out = MHA(q, x + positions, x),
where positions go to the keys after their norm and never to the values.

Surprises:
- MiniCPM-V 1.0 and 2.0 store a square table of positions with as many places as queries, add it to
  the queries too, and resize it to the features' grid; 2.5 and 2.6 compute the table of the grid
  itself, and their queries have no positions.
- The last matrix is published as `x @ proj`; ours is a linear layer's, transposed.
- The reference leaves `kv_proj` out where D = E. No published model has that; here it is always.

Follows `omnilmm/model/resampler.py` of OpenBMB/MiniCPM-V and the `resampler.py` that MiniCPM-V 2.6
ships with its weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from connectors.attention import attend
from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.errors import UserError
from connectors.key_table import KeyTable, Layout, Stacked, Transposed
from connectors.position_tables import StoredTable, sincos_2d


def heads_for(text_dim: int, num_heads: int | None, where: str) -> int:
    """Return the number of heads: the given one, or one per 128 channels, as published.

    Where 128 does not divide E, heads are the widest next to 128 that do.

    Raises:
        UserError: the given number does not divide E.
    """
    if num_heads is None:
        wanted = max(1, text_dim // 128)
        return next(heads for heads in range(wanted, 0, -1) if text_dim % heads == 0)
    if num_heads < 1 or text_dim % num_heads:
        raise UserError(
            f"{where}: num_heads {num_heads} does not divide the language model's width {text_dim}"
        )
    return num_heads


def check_square(num_queries: int, where: str) -> None:
    """Refuse a number of queries that is not a square.

    Raises:
        UserError: it is not.
    """
    if num_queries < 1 or isqrt(num_queries) ** 2 != num_queries:
        raise UserError(f"{where}: num_queries must be a square, such as 64, not {num_queries}")


class QueryResampler(nn.Module):
    """Q learned queries read features by one cross-attention."""

    def __init__(self, vision_dim: int, text_dim: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(num_queries, text_dim))
        self.kv_proj = nn.Linear(vision_dim, text_dim, bias=False)
        self.norm_query = nn.LayerNorm(text_dim, eps=1e-6)
        self.norm_features = nn.LayerNorm(text_dim, eps=1e-6)
        self.to_q = nn.Linear(text_dim, text_dim)
        self.to_k = nn.Linear(text_dim, text_dim)
        self.to_v = nn.Linear(text_dim, text_dim)
        self.to_out = nn.Linear(text_dim, text_dim)
        self.norm_out = nn.LayerNorm(text_dim, eps=1e-6)
        self.proj = nn.Linear(text_dim, text_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set new weights as the reference does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query, std=0.02)
        dim = self.query.shape[1]
        # `nn.MultiheadAttention` draws q, k, v as one (3 E, E) matrix: Xavier's bound of that one.
        bound = (6 / (dim + 3 * dim)) ** 0.5
        for layer in (self.to_q, self.to_k, self.to_v):
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.normal_(self.proj.weight, std=dim**-0.5)

    def forward(
        self,
        features: Tensor,
        key_positions: Tensor,
        query_positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return tokens (T, Q, E).

        Args:
            features: (T, K, D).
            key_positions: (K, E), or (T, K, E) where views differ.
            query_positions: (Q, E), or None for queries without positions.
            mask: (T, K), True where a feature is real; all by default.
        """
        x = self.norm_features(self.kv_proj(features))  # (T, K, E)
        q = self.norm_query(self.query)  # (Q, E), the same for all views until they read
        if query_positions is not None:
            q = q + query_positions.to(q.dtype)
        mixed = attend(
            self.to_q(q).expand(len(x), -1, -1),
            self.to_k(x + key_positions.to(x.dtype)),
            self.to_v(x),
            self.num_heads,
            mask,
        )
        return self.proj(self.norm_out(self.to_out(mixed)))


def resampler_keys(root: str, tail: str) -> dict[str, str | Layout]:
    """Return the published keys of a `QueryResampler` held as `resampler`.

    Args:
        root: dotted name of the reference's module.
        tail: dotted name of what holds its last norm and matrix: another module in Qwen-VL.
    """
    keys: dict[str, str | Layout] = {
        f"{root}.query": "resampler.query",
        f"{root}.kv_proj.weight": "resampler.kv_proj.weight",
        f"{tail}.proj": Transposed("resampler.proj.weight"),
    }
    for n in ("weight", "bias"):
        parts = (f"resampler.{layer}.{n}" for layer in ("to_q", "to_k", "to_v"))
        keys[f"{root}.attn.in_proj_{n}"] = Stacked(*parts)
        keys[f"{root}.attn.out_proj.{n}"] = f"resampler.to_out.{n}"
        keys[f"{root}.ln_q.{n}"] = f"resampler.norm_query.{n}"
        keys[f"{root}.ln_kv.{n}"] = f"resampler.norm_features.{n}"
        keys[f"{tail}.ln_post.{n}"] = f"resampler.norm_out.{n}"
    return keys


@dataclass(frozen=True, kw_only=True)
class MiniCPMResamplerConfig(ConnectorConfig):
    """How many tokens a view gets, and where the positions come from."""

    num_queries: int = 64  # 2.0: 64, 2.5: 96, 2.6: 64
    # "2.0", also for 1.0 and OmniLMM: stored square table, queries with positions; "2.5", also for
    # 2.6: the table of the grid itself, for keys alone
    version: Literal["2.0", "2.5"] = "2.5"
    num_heads: int | None = None  # None: one per 128 channels of E, as published

    def __post_init__(self) -> None:
        if self.version == "2.0":
            check_square(self.num_queries, "connector 'minicpm_resampler', version 2.0")
        if self.num_queries < 1:
            raise UserError(
                "connector 'minicpm_resampler': num_queries must be at least 1, not "
                f"{self.num_queries}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, Q): the tokens are no picture."""
        return 1, self.num_queries


class MiniCPMResamplerConnector(Connector[MiniCPMResamplerConfig]):
    """Queries that read the features once, with two-dimensional positions."""

    config_class = MiniCPMResamplerConfig

    def __init__(
        self, config: MiniCPMResamplerConfig, vision_dims: Sequence[int], text_dim: int
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        heads = heads_for(text_dim, config.num_heads, "connector 'minicpm_resampler'")
        self.resampler = QueryResampler(sum(vision_dims), text_dim, config.num_queries, heads)
        stored = config.version == "2.0"
        self.positions = StoredTable(isqrt(config.num_queries), text_dim) if stored else None

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, Q, E)."""
        joined = join_channels(features, self.vision_dims)
        height, width = joined.shape[1:3]
        flat = joined.flatten(1, 2)
        if self.positions is None:
            table = sincos_2d(height, width, self.text_dim, device=flat.device)
            return self.resampler(flat, table.flatten(0, 1))
        side = isqrt(self.config.num_queries)
        return self.resampler(flat, self.positions(height, width), self.positions(side, side))

    @classmethod
    def key_tables(cls, config: MiniCPMResamplerConfig) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of MiniCPM-V's `resampler`."""
        keys = resampler_keys("resampler", "resampler")
        if config.version == "2.0":
            return {"minicpm_v": {**keys, "resampler.pos_embed": "positions.table"}}
        # 2.6 computes the table; a checkpoint saved with it holds what is computed anyway.
        return {"minicpm_v": KeyTable(keys, ("resampler",), ("resampler.pos_embed",))}
