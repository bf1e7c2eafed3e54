"""What does a connector that merges features have to beat? Averaging them, and an MLP.

Shapes: T views, H W feature grid, D encoder width, N tokens per view, E language-model width.

"before": features are pooled, then projected (the baseline of Honeybee and DeCo,
arXiv:2312.06742 and arXiv:2405.20985); "after": projected, then pooled (`get_2dPool` of
LLaVA-NeXT-Video and LLaVA-OneVision in `llava/model/llava_arch.py`, which pools videos so).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.errors import UserError
from connectors.mlp import MLPConfig, MLPConnector


@dataclass(frozen=True, kw_only=True)
class PoolingConfig(ConnectorConfig):
    """How many tokens there are, and how and when features become so few."""

    side: int | None = None  # rows and columns of tokens; None: half of the features', rounded up
    kind: Literal["average", "bilinear"] = "average"  # "average" over the cells of any token grid
    pool: Literal["before", "after"] = "before"  # the MLP
    depth: int = 2  # linear layers of the MLP

    def __post_init__(self) -> None:
        if self.depth < 1 or (self.side is not None and self.side < 1):
            raise UserError(
                f"connector 'pooling': side and depth must be at least 1, not {self.side} and "
                f"{self.depth}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return `side` twice, or half the grid, rounded up."""
        if self.side is None:
            return (height + 1) // 2, (width + 1) // 2
        return self.side, self.side


class PoolingConnector(Connector[PoolingConfig]):
    """Features are averaged to a smaller grid, before or after an MLP."""

    config_class = PoolingConfig

    def __init__(self, config: PoolingConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.layers = MLPConnector(MLPConfig(depth=config.depth), vision_dims, text_dim).layers

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, N, E)."""
        joined = join_channels(features, self.vision_dims)
        grid = self.token_grid(*joined.shape[1:3])
        if self.config.pool == "before":
            return self.layers(pool(joined, grid, self.config.kind)).flatten(1, 2)
        return pool(self.layers(joined), grid, self.config.kind).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: PoolingConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of LLaVA's `mm_projector`, which the MLP is."""
        return MLPConnector.key_tables(MLPConfig(depth=config.depth))


def pool(features: Tensor, grid: tuple[int, int], kind: Literal["average", "bilinear"]) -> Tensor:
    """Return features (T, H, W, D) at another grid.

    "average" is the mean over a token's cell, cells overlapping by a row or column where the grid
    does not divide H and W (`nn.AdaptiveAvgPool2d`); "bilinear" reads between the four features
    around the cell's middle.
    """
    channels_first = features.permute(0, 3, 1, 2)
    if kind == "average":
        pooled = F.adaptive_avg_pool2d(channels_first, grid)
    else:
        pooled = F.interpolate(channels_first.float(), grid, mode="bilinear").to(features.dtype)
    return pooled.permute(0, 2, 3, 1)
