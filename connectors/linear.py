"""What is the simplest connector? One linear layer on every feature (LLaVA 1.0).

Shapes: T views, H W feature grid, D encoder width, N = H * W tokens per view, E language-model
width.
Follows `llava/model/multimodal_projector/builder.py` of haotian-liu/LLaVA, type `linear`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, join_channels


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ConnectorConfig):
    """A linear connector has nothing to choose."""


class LinearConnector(Connector[LinearConfig]):
    """One linear layer with bias; one token per feature."""

    config_class = LinearConfig

    def __init__(self, config: LinearConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.layer = nn.Linear(sum(vision_dims), text_dim)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, H * W, E)."""
        return self.layer(join_channels(features, self.vision_dims)).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: LinearConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of LLaVA's `mm_projector`."""
        return {"llava": {f"mm_projector.{name}": f"layer.{name}" for name in ("weight", "bias")}}
