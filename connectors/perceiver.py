"""How does Flamingo make 64 tokens of any picture? Latents that look at features and themselves.

Shapes: T views, H W feature grid, D encoder width, Q latents, N = Q tokens per view, E
language-model width; B batch, M media, F frames, K features of a frame.

Surprises:
- Keys and values are the features first, then the latents themselves; both are normed anew in each
  layer, and the latents keep a residual path.
- The latents have the encoder's width: in Flamingo the gated cross-attention goes on to E. As a
  connector of its own it ends in a linear layer, which no published checkpoint has; `projection:
  none` leaves it out for what takes tokens of width D.

Follows `open_flamingo/src/helpers.py` (PerceiverResampler) of mlfoundations/open_flamingo.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from connectors.attention import attend
from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.key_table import Layout


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(ConnectorConfig):
    """How many tokens a view gets, and how deep and wide their layers are."""

    num_queries: int = 64  # Q, the latents
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    projection: Literal["linear", "none"] = "linear"  # "none": Flamingo; the tokens have width D

    def __post_init__(self) -> None:
        check_positive(
            "connector 'perceiver'",
            num_queries=self.num_queries,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, Q): the tokens are no picture."""
        return 1, self.num_queries


class PerceiverAttention(nn.Module):
    """Latents attend to features and latents."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner_dim = num_heads * head_dim
        self.norm_features = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Map features (T, K, D) and latents (T, Q, D) to what is added to the latents."""
        latents = self.norm_latents(latents)
        seen = torch.cat([self.norm_features(features), latents], dim=1)
        key, value = self.to_kv(seen).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), key, value, self.num_heads))


class PerceiverLayer(nn.Module):
    """Attention, then a feed-forward layer four times as wide; both with a residual path."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention = PerceiverAttention(dim, num_heads, head_dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Map features (T, K, D) and latents (T, Q, D) to latents."""
        latents = latents + self.attention(features, latents)
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """Q latents of width D for each of M media, whatever the number of its features and frames."""

    def __init__(
        self,
        dim: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        max_num_frames: int | None = None,
        max_num_media: int | None = None,
    ) -> None:
        """Build the layers.

        Args:
            dim: D.
            num_queries: Q.
            num_layers: how often the latents look.
            num_heads: heads of each attention.
            head_dim: channels of a head.
            max_num_frames: learn an embedding of a frame's place for so many; none by default.
            max_num_media: learn an embedding of a medium's place for so many; none by default.
        """
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_queries, dim))
        self.frame_embeddings = (
            None if max_num_frames is None else nn.Parameter(torch.randn(max_num_frames, dim))
        )
        self.media_embeddings = (
            None if max_num_media is None else nn.Parameter(torch.randn(max_num_media, 1, dim))
        )
        self.layers = nn.ModuleList(
            PerceiverLayer(dim, num_heads, head_dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, M, F, K, D) to latents (B, M, Q, D).

        Raises:
            UserError: more frames or media than embeddings of their place.
        """
        batch, num_media, num_frames = features.shape[:3]
        if self.frame_embeddings is not None:
            _check_room("frames", num_frames, len(self.frame_embeddings))
            features = features + self.frame_embeddings[:num_frames, None]
        features = features.flatten(2, 3)  # (B, M, F * K, D)
        if self.media_embeddings is not None:
            _check_room("media", num_media, len(self.media_embeddings))
            features = features + self.media_embeddings[:num_media]
        features = features.flatten(0, 1)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.norm(latents).unflatten(0, (batch, num_media))


def _check_room(what: str, count: int, room: int) -> None:
    if count > room:
        raise UserError(f"the perceiver has places for {room} {what}, but got {count}")


def resampler_keys(num_layers: int, *, frames: bool = False, media: bool = False) -> dict[str, str]:
    """Return OpenFlamingo's keys of a `PerceiverResampler` that is held as `resampler`.

    Args:
        num_layers: how many layers it has.
        frames: it has embeddings of a frame's place.
        media: it has embeddings of a medium's place.
    """
    attention = {f"{part}.weight": f"{part}.weight" for part in ("to_q", "to_kv", "to_out")}
    for n in ("weight", "bias"):
        attention[f"norm_media.{n}"] = f"norm_features.{n}"
        attention[f"norm_latents.{n}"] = f"norm_latents.{n}"
    keys = {"latents": "latents", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    for i in range(num_layers):
        keys |= {f"layers.{i}.0.{k}": f"layers.{i}.attention.{v}" for k, v in attention.items()}
        for name in ("0.weight", "0.bias", "1.weight", "3.weight"):
            keys[f"layers.{i}.1.{name}"] = f"layers.{i}.feed_forward.{name}"
    if frames:
        keys["frame_embs"] = "frame_embeddings"
    if media:
        keys["media_time_embs"] = "media_embeddings"
    return {f"perceiver.{theirs}": f"resampler.{ours}" for theirs, ours in keys.items()}


class PerceiverConnector(Connector[PerceiverConfig]):
    """Flamingo's resampler, each view a medium of one frame, and a linear layer to E."""

    config_class = PerceiverConfig

    def __init__(self, config: PerceiverConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        """Build the resampler.

        Raises:
            UserError: no projection, but the tokens' width D is not what is wanted.
        """
        super().__init__(config, vision_dims, text_dim)
        dim = sum(vision_dims)
        if config.projection == "none" and dim != text_dim:
            raise UserError(
                f"connector 'perceiver' with projection: none gives tokens of the encoder's width "
                f"{dim}, but {text_dim} is wanted; choose projection: linear"
            )
        self.resampler = PerceiverResampler(
            dim, config.num_queries, config.num_layers, config.num_heads, config.head_dim
        )
        self.projection = (
            nn.Linear(dim, text_dim) if config.projection == "linear" else nn.Identity()
        )

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, Q, E)."""
        joined = join_channels(features, self.vision_dims)
        latents = self.resampler(joined.flatten(1, 2)[:, None, None])
        return self.projection(latents.squeeze(1))

    @classmethod
    def key_tables(cls, config: PerceiverConfig) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of OpenFlamingo's `perceiver`, which ends without a projection."""
        if config.projection == "linear":
            return {}
        return {"openflamingo": resampler_keys(config.num_layers)}
