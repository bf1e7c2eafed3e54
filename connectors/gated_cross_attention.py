"""How do texts look at pictures that are not in the sequence? Gated cross-attention (Flamingo).

Shapes: B batch, L sequence, E language-model width, M media tokens of a row, D their width, T
views.

Before every n-th decoder layer, a new block lets each text position attend to the media of the
image that began last in its document, and adds a feed-forward layer; both behind gates that begin
at 0, so that the language model starts unchanged. In the sequence one learned token stands for each
view: `[{type: perceiver, projection: none}, {type: gated_cross_attention}]` is Flamingo.

Surprises:
- Positions before the first image get nothing from the attention. The reference does so for the
  image that began last; for all earlier ones it lets them attend to everything, by mistake.
- Media are not normed here: the perceiver ends in a norm.

Follows `GatedCrossAttentionBlock` in `open_flamingo/src/helpers.py` of mlfoundations/open_flamingo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from connectors.attention import attend
from connectors.base import Connector, ConnectorConfig
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, Media


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


class GatedBlock(nn.Module):
    """Attention to media and a feed-forward layer, each behind tanh of a gate."""

    def __init__(
        self, dim: int, media_dim: int, num_heads: int, head_dim: int, hidden_factor: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(media_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden_factor * dim, bias=False),
            nn.GELU(),
            nn.Linear(hidden_factor * dim, dim, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,
        media: Tensor | None,
        mask: Tensor | None,
        projected: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        """Map hidden states (B, L, E) to hidden states.

        Args:
            x: (B, L, E).
            media: (B, M, D); None: no position sees any.
            mask: (B, L, M), True where a position may look.
            projected: where keys and values (B, M, 2 * inner) are kept between calls.
            name: theirs in `projected`.
        """
        if media is not None and mask is not None:
            kv = None if projected is None else projected.get(name)
            if kv is None:
                kv = self.to_kv(media)
                if projected is not None:
                    projected[name] = kv
            sees = mask.any(-1, keepdim=True)  # (B, L, 1)
            key, value = kv.chunk(2, dim=-1)
            mask = mask | ~sees  # a softmax over nothing has no value
            found = attend(self.to_q(self.norm(x)), key, value, self.num_heads, mask)
            found = self.to_out(torch.where(sees, found, 0.0))
            x = x + self.attention_gate.tanh() * found
        return x + self.feed_forward_gate.tanh() * self.feed_forward(x)


class Placeholder(nn.Module):
    """A learned token that stands for a view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, num_views: int) -> Tensor:
        """Return (T, 1, E)."""
        return self.token.expand(num_views, 1, -1)


class GatedCrossAttentionConnector(Connector[GatedCrossAttentionConfig]):
    """A `GatedBlock` before every n-th decoder layer, over the tokens of the connector before."""

    config_class = GatedCrossAttentionConfig
    faces = frozenset({"in_layer"})
    side_kind = "media"
    takes_tokens = True

    def __init__(
        self,
        config: GatedCrossAttentionConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        num_layers: int,
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.dim_of_media = self.media_dim(config, vision_dims)
        self._numbers = [i for i in range(num_layers) if (i + 1) % config.every == 0]
        self.blocks = nn.ModuleList(
            GatedBlock(
                text_dim,
                self.dim_of_media,
                config.num_heads,
                config.head_dim,
                config.hidden_factor,
            )
            for _ in self._numbers
        )
        self.placeholder = Placeholder(text_dim)

    @classmethod
    def build(
        cls,
        config: GatedCrossAttentionConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape | None,
    ) -> Self:
        """Build for the language model `host`.

        Raises:
            UserError: it has fewer layers than lie between two blocks.
        """
        assert host is not None
        if host.num_layers < config.every:
            raise UserError(
                f"connector 'gated_cross_attention' has a block every {config.every} decoder "
                f"layers, but the language model has {host.num_layers}; set a smaller every"
            )
        return cls(config, vision_dims, text_dim, host.num_layers)

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
        number = self._numbers.index(site.layer)
        block = self.blocks[number]
        if side is None:
            if not context.run_all:
                return block(hidden, None, None)
            media = hidden.new_zeros(len(hidden), 1, self.dim_of_media)
            return block(hidden, media, media.new_zeros(*hidden.shape[:2], 1, dtype=torch.bool))
        assert isinstance(side, Media)
        # What training computes belongs to its graph, and is computed again in the backward pass.
        kept = None if torch.is_grad_enabled() else side.projected
        mask = context.attend(side, self.config.scope)
        return block(hidden, side.tokens.to(hidden), mask, kept, f"gated.{number}")


def openflamingo_keys(layers: Sequence[int]) -> dict[str, str]:
    """Return OpenFlamingo's keys of the blocks before `layers`, and ours.

    The same weights also stand in its checkpoints under the decoder's own path.
    """
    block = {"attn.norm.weight": "norm.weight", "attn.norm.bias": "norm.bias"}
    block |= {f"attn.{n}.weight": f"{n}.weight" for n in ("to_q", "to_kv", "to_out")}
    block |= {
        f"ff.{n}": f"feed_forward.{n}" for n in ("0.weight", "0.bias", "1.weight", "3.weight")
    }
    block |= {"attn_gate": "attention_gate", "ff_gate": "feed_forward_gate"}
    return {
        f"gated_cross_attn_layers.{layer}.{theirs}": f"blocks.{number}.{ours}"
        for number, layer in enumerate(layers)
        for theirs, ours in block.items()
    }
