"""How does a language model see without an encoder? Fuyu's linear layer on raw patches.

Shapes: T views, H W patch grid, D = p * p * 3 values of a patch, N = H * W tokens per view,
E language-model width.

The encoder beside it is `{type: patches, patch_size: 30}`, which cuts views into patches whose
values stand in the order (row, column, colour). Nothing else says where a patch was: rows end in
newline tokens, so choose a tiling that has them.

Follows `modeling_fuyu.py` (vision_embed_tokens) of transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, join_channels


@dataclass(frozen=True, kw_only=True)
class FuyuConfig(ConnectorConfig):
    """Nothing to choose: the encoder says how large a patch is."""


class FuyuConnector(Connector[FuyuConfig]):
    """One linear layer with bias; one token per patch."""

    config_class = FuyuConfig

    def __init__(self, config: FuyuConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.embed = nn.Linear(sum(vision_dims), text_dim)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map patches (T, H, W, D) to tokens (T, H * W, E)."""
        return self.embed(join_channels(features, self.vision_dims)).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: FuyuConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of Fuyu's `vision_embed_tokens`."""
        names = ("weight", "bias")
        return {"fuyu": {f"vision_embed_tokens.{n}": f"embed.{n}" for n in names}}
