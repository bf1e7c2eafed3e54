"""How do texts look at pictures that are not in the sequence? Gated cross-attention (Flamingo).

Shapes: B batch, L sequence, E language-model width, M media tokens of a row, D their width, T
views.

Before every n-th decoder layer, a new block lets each text position attend to the media of the
image that began last in its document, and adds a feed-forward layer; both behind gates that begin
at 0, so that the language model starts unchanged. In the sequence one learned token stands for each
view: `[{type: perceiver, projection: none}, {type: gated_cross_attention}]` is Flamingo.

The block is in connectors/gated_cross_attention_blocks.py.
Follows `open_flamingo/src/flamingo_lm.py` of mlfoundations/open_flamingo.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from connectors.base import ConnectorConfig, InsideConnector
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, Media
from connectors.gated_cross_attention_blocks import (
    GatedCrossAttentionBlock,
    gated_cross_attention_keys,
    gated_layers,
)
from connectors.key_table import Layout


@dataclass(frozen=True, kw_only=True)
class GatedCrossAttentionConfig(ConnectorConfig):
    """Where the blocks are and how wide; OpenFlamingo's 9B has one every 4 layers."""

    every: int = 4
    num_heads: int = 8
    head_dim: int = 64
    hidden_factor: int = 4  # of the feed-forward layer
    scope: Literal["latest", "previous"] = "latest"  # the last image, or all so far
    media_dim: int | None = None  # D; None: the width of the vision encoder's features, as Flamingo

    def __post_init__(self) -> None:
        check_positive(
            "connector 'gated_cross_attention'",
            every=self.every,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            hidden_factor=self.hidden_factor,
            media_dim=1 if self.media_dim is None else self.media_dim,
        )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, 1): one token stands for a view."""
        return 1, 1


class Placeholder(nn.Module):
    """A learned token that stands for a view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, num_views: int) -> Tensor:
        """Return (T, 1, E)."""
        return self.token.expand(num_views, 1, -1)


class GatedCrossAttentionConnector(InsideConnector[GatedCrossAttentionConfig]):
    """A block before every n-th decoder layer, over the tokens of the connector before."""

    config_class = GatedCrossAttentionConfig
    faces = frozenset({"in_layer"})
    side_kind = "media"
    takes_tokens = True

    def __init__(
        self,
        config: GatedCrossAttentionConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape,
    ) -> None:
        """Build the blocks.

        Raises:
            UserError: the language model has fewer layers than lie between two blocks.
        """
        super().__init__(config, vision_dims, text_dim, host)
        if host.num_layers < config.every:
            raise UserError(
                f"connector 'gated_cross_attention' has a block every {config.every} decoder "
                f"layers, but the language model has {host.num_layers}; set a smaller every"
            )
        self._numbers = gated_layers(host.num_layers, config.every)
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(
                text_dim,
                self.media_dim(config, vision_dims),
                config.num_heads,
                config.head_dim,
                config.hidden_factor,
            )
            for _ in self._numbers
        )
        self.placeholder = Placeholder(text_dim)

    @classmethod
    def media_dim(cls, config: GatedCrossAttentionConfig, vision_dims: Sequence[int]) -> int:
        """Return D, the width of the tokens that are attended to."""
        return sum(vision_dims) if config.media_dim is None else config.media_dim

    def side(self, features: Sequence[Tensor], tokens: Tensor | None) -> Sequence[Tensor]:
        """Return the tokens of the connector before, (T, N, D), as media."""
        assert tokens is not None
        return [tokens]

    def replace_tokens(self, tokens: Tensor) -> Tensor:
        """Return one learned token for each view of (T, N, D): (T, 1, E)."""
        return self.placeholder(len(tokens))

    def layer_sites(self) -> Sequence[LayerSite]:
        """Return the decoder layers with a block before them."""
        return [LayerSite(i, "before") for i in self._numbers]

    def layer_apply(
        self,
        site: LayerSite,
        hidden: Tensor,
        context: FusionContext,
        side: Sequence[Tensor] | Media | None,
    ) -> Tensor:
        """Pass hidden states (B, L, E) through the block before a layer."""
        assert side is None or isinstance(side, Media)
        number = self._numbers.index(site.layer)
        block: GatedCrossAttentionBlock = self.blocks[number]  # pyright: ignore
        return block.pass_through(hidden, context, side, self.config.scope, f"gated.{number}")

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return OpenFlamingo's keys; its token for a view is a row of the embedding."""
        tables = gated_cross_attention_keys(self._numbers, "blocks.")
        return {name: table for name, table in tables.items()}
