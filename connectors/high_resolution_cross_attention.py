"""How do decoder layers look at a finer picture than the sequence holds? CogAgent's way.

Shapes: B batch, L sequence, E language-model width, T views, H W feature grid, D encoder width, M
features of a row's pictures.

Another connector makes tokens of a coarse picture; the features that this one is given, those of a
second encoder, are attended to by all positions, text too, between attention and feed-forward part
of every decoder layer: `[{type: mlp, features: [0]}, {type: high_resolution_cross_attention,
features: [1]}]`. The block is in connectors/high_resolution_blocks.py.

Surprise: positions see all images of their document, also those that come later, as in the
reference, whose image comes first. With `scope: previous` they see those that have begun.

Follows `modeling_cogagent.py` of THUDM/cogagent-chat-hf; section 2.2 of arXiv:2312.08914.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from connectors.base import ConnectorConfig, InsideConnector, join_channels
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, Media
from connectors.high_resolution_blocks import (
    HighResolutionBlock,
    LearnedPositions,
    high_resolution_keys,
)
from connectors.key_table import Layout


@dataclass(frozen=True, kw_only=True)
class HighResolutionConfig(ConnectorConfig):
    """How wide the attention is, and for which grid positions are learned."""

    inner_dim: int = 1024  # of queries, keys and values; the language model's heads share it
    position_side: int = 80  # positions are learned for 80 x 80 features, and resized for others
    scope: Literal["document", "previous"] = "document"

    def __post_init__(self) -> None:
        check_positive(
            "connector 'high_resolution_cross_attention'",
            inner_dim=self.inner_dim,
            position_side=self.position_side,
        )


class HighResolutionConnector(InsideConnector[HighResolutionConfig]):
    """A `HighResolutionBlock` in every decoder layer."""

    config_class = HighResolutionConfig
    faces = frozenset({"in_layer"})
    side_kind = "media"

    def __init__(
        self,
        config: HighResolutionConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape,
    ) -> None:
        """Build the blocks.

        Raises:
            UserError: the language model's heads do not divide the attention's width.
        """
        super().__init__(config, vision_dims, text_dim, host)
        if config.inner_dim % host.num_heads:
            raise UserError(
                f"connector 'high_resolution_cross_attention': inner_dim {config.inner_dim} is no "
                f"multiple of the language model's {host.num_heads} heads; choose another"
            )
        dim = sum(vision_dims)
        self.positions = LearnedPositions(config.position_side, dim)
        self.blocks = nn.ModuleList(
            HighResolutionBlock(text_dim, dim, config.inner_dim, host.num_heads, host.norm_eps)
            for _ in host.layers
        )

    def side(self, features: Sequence[Tensor], tokens: Tensor | None) -> Sequence[Tensor]:
        """Return features (T, H, W, D_i), with learned positions, as media (T, H * W, D)."""
        return [self.positions(join_channels(features, self.vision_dims))]

    def layer_sites(self) -> Sequence[LayerSite]:
        """Return the place behind each decoder layer's attention."""
        return [LayerSite(i, "after_attention") for i in range(len(self.blocks))]

    def layer_apply(
        self,
        site: LayerSite,
        hidden: Tensor,
        context: FusionContext,
        side: Sequence[Tensor] | Media | None,
    ) -> Tensor:
        """Pass hidden states (B, L, E) through a layer's block."""
        assert side is None or isinstance(side, Media)
        block: HighResolutionBlock = self.blocks[site.layer]  # pyright: ignore
        name = f"high_resolution.{site.layer}"
        return block.pass_through(hidden, context, side, self.config.scope, name)

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return CogAgent's keys."""
        return dict(high_resolution_keys(range(len(self.blocks)), "blocks.", "positions."))
