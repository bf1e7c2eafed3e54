"""How does Idefics2 make 64 tokens of any picture? A projection to E first, then a perceiver there.

Shapes: T views, H W feature grid, K = H * W features, D encoder width, Q latents, N = Q tokens per
view, E language-model width, I width of the projection's hidden layer.

Surprises:
- Unlike Flamingo's (perceiver.py), the layers work at the language model's width, with gated
  feed-forward layers, RMS norms and 4 heads of keys for 16 of queries; heads * channels is not E.
- All latents start as ones: new tokens of a view are equal until training tells them apart.
- The norms' eps stands in `perceiver_config.rms_norm_eps` of a published config, and depends on how
  that was made: take the resolved value.

Follows transformers' `models/idefics2/modeling_idefics2.py` (Idefics2Connector).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.attention import attend
from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.key_table import KeyTable, Layout


@dataclass(frozen=True, kw_only=True)
class Idefics2PerceiverConfig(ConnectorConfig):
    """How many tokens a view gets, and how deep and wide their layers are."""

    num_queries: int = 64  # Q, the latents
    num_layers: int = 3
    num_heads: int = 16
    num_key_heads: int = 4
    head_dim: int = 96
    # I: the language model's own intermediate size in the reference; None: 3.5 E, as in Mistral 7B
    projection_dim: int | None = None
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(
            "connector 'idefics2_perceiver'",
            num_queries=self.num_queries,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            head_dim=self.head_dim,
        )
        if self.num_heads % self.num_key_heads:
            raise UserError(
                f"connector 'idefics2_perceiver': num_key_heads {self.num_key_heads} does not "
                f"divide num_heads {self.num_heads}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, Q): the tokens are no picture."""
        return 1, self.num_queries


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, its weight applied in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension of (..., dim)."""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no bias."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_dim, hidden_dim, bias=False)
        self.up = nn.Linear(in_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Idefics2Layer(nn.Module):
    """Latents attend to features and latents, then a gated feed-forward layer."""

    def __init__(self, config: Idefics2PerceiverConfig, dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads = config.num_heads, config.num_key_heads
        inner_dim = config.num_heads * config.head_dim
        key_dim = config.num_key_heads * config.head_dim
        self.norm_latents = RMSNorm(dim, config.rms_norm_eps)
        self.norm_features = RMSNorm(dim, config.rms_norm_eps)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, key_dim, bias=False)
        self.to_v = nn.Linear(dim, key_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)
        self.norm_mlp = RMSNorm(dim, config.rms_norm_eps)
        self.mlp = GatedMLP(dim, 4 * dim, dim)

    def forward(self, features: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Map features (T, K, E), latents (T, Q, E) and a mask (T, K + Q) to latents."""
        normed = self.norm_latents(latents)
        seen = torch.cat([self.norm_features(features), normed], dim=1)
        mixed = attend(
            self.to_q(normed),
            self.to_k(seen),
            self.to_v(seen),
            self.num_heads,
            mask,
            num_key_heads=self.num_key_heads,
        )
        latents = latents + self.to_out(mixed)
        return latents + self.mlp(self.norm_mlp(latents))


class Idefics2Resampler(nn.Module):
    """Projection of the features to E, then Q latents that read them."""

    def __init__(self, config: Idefics2PerceiverConfig, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        hidden_dim = config.projection_dim or int(3.5 * text_dim)
        self.projection = GatedMLP(vision_dim, hidden_dim, text_dim)
        self.latents = nn.Parameter(torch.ones(config.num_queries, text_dim))
        self.layers = nn.ModuleList(
            Idefics2Layer(config, text_dim) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(text_dim, config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features (T, K, D) and a mask (T, K), True where one is real, to tokens (T, Q, E)."""
        features = self.projection(features)
        latents = self.latents.expand(len(features), -1, -1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(latents.shape[:2])], dim=1)
        for layer in self.layers:
            latents = layer(features, latents, mask)
        return self.norm(latents)


class Idefics2PerceiverConnector(Connector[Idefics2PerceiverConfig]):
    """Idefics2's projection and perceiver."""

    config_class = Idefics2PerceiverConfig

    def __init__(
        self, config: Idefics2PerceiverConfig, vision_dims: Sequence[int], text_dim: int
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.resampler = Idefics2Resampler(config, sum(vision_dims), text_dim)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, Q, E)."""
        return self.resampler(join_channels(features, self.vision_dims).flatten(1, 2))

    @classmethod
    def key_tables(
        cls, config: Idefics2PerceiverConfig
    ) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of transformers' Idefics2."""
        layer = {
            "input_latents_norm": "norm_latents",
            "input_context_norm": "norm_features",
            "self_attn.q_proj": "to_q",
            "self_attn.k_proj": "to_k",
            "self_attn.v_proj": "to_v",
            "self_attn.o_proj": "to_out",
            "post_attention_layernorm": "norm_mlp",
        }
        layer |= {f"mlp.{part}_proj": f"mlp.{part}" for part in ("gate", "up", "down")}
        theirs, ours = "connector.perceiver_resampler", "resampler"
        keys: dict[str, str | Layout] = {
            f"connector.modality_projection.{part}_proj.weight": f"{ours}.projection.{part}.weight"
            for part in ("gate", "up", "down")
        }
        keys |= {f"{theirs}.latents": f"{ours}.latents"}
        keys |= {f"{theirs}.norm.weight": f"{ours}.norm.weight"}
        for i in range(config.num_layers):
            keys |= {
                f"{theirs}.layers.{i}.{their_part}.weight": f"{ours}.layers.{i}.{our_part}.weight"
                for their_part, our_part in layer.items()
            }
        return {"idefics2": KeyTable(keys, ("connector",))}
