"""How does Qwen-VL make 256 tokens of 1024? Queries on a grid read features on a finer grid.

Shapes: T views, H W feature grid, D encoder width, Q queries, N = Q tokens per view, E
language-model width.

The same numbers as MiniCPM-V 2.0's resampler (minicpm_resampler.py): one cross-attention, a stored
square table of positions for queries and, resized, for keys. Only names and sizes differ.

Follows `visual.py`, which Qwen-VL ships with its weights (class Resampler and the end of
VisionTransformer); a public copy is `monkey_model/visual.py` of Yuliang-Liu/Monkey.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

from torch import Tensor

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.key_table import KeyTable, Layout
from connectors.minicpm_resampler import QueryResampler, check_square, heads_for, resampler_keys
from connectors.position_tables import StoredTable


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig(ConnectorConfig):
    """How many tokens a view gets."""

    num_queries: int = 256  # a square: the queries stand on a grid
    num_heads: int | None = None  # None: one per 128 channels of E, as published

    def __post_init__(self) -> None:
        check_square(self.num_queries, "connector 'qwen_vl'")

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, Q): each query may look anywhere, so that rows of them mean little."""
        return 1, self.num_queries


class QwenVLConnector(Connector[QwenVLConfig]):
    """Qwen-VL's position-aware adapter."""

    config_class = QwenVLConfig

    def __init__(self, config: QwenVLConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        heads = heads_for(text_dim, config.num_heads, "connector 'qwen_vl'")
        self.resampler = QueryResampler(sum(vision_dims), text_dim, config.num_queries, heads)
        self.positions = StoredTable(isqrt(config.num_queries), text_dim)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, Q, E)."""
        joined = join_channels(features, self.vision_dims)
        side = isqrt(self.config.num_queries)
        return self.resampler(
            joined.flatten(1, 2), self.positions(*joined.shape[1:3]), self.positions(side, side)
        )

    @classmethod
    def key_tables(cls, config: QwenVLConfig) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of Qwen-VL; the last norm and matrix lie in its encoder."""
        visual = "transformer.visual"
        keys = resampler_keys(f"{visual}.attn_pool", visual)
        keys[f"{visual}.attn_pool.pos_embed"] = "positions.table"
        roots = (f"{visual}.attn_pool", f"{visual}.ln_post", f"{visual}.proj")
        return {"qwen_vl": KeyTable(keys, roots)}
