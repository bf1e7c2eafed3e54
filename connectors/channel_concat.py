"""How are several encoders joined most simply? On channels of one grid, then an MLP.

Shapes: T views, H_i W_i feature grid and D_i width of map i, H W token grid, N = H * W tokens per
view, E language-model width.

Eagle (`mlp`: two layers, a 32 x 32 grid), Prismatic and Cobra (`fused_mlp`: three layers, the
inner one four times as wide as the joined features; DINOv2 and SigLIP on one grid).
Surprise: Eagle resizes with aligned corners; everything else in this suite does not.

Follows `multi_backbone_channel_concatenation_encoder.py` of NVlabs/EAGLE and
`prismatic/util/nn_utils.py` (FusedMLPProjector) of TRI-ML/prismatic-vlms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ChannelConcatConfig(ConnectorConfig):
    """On which grid the maps meet, and what projects them."""

    side: int | None = None  # rows and columns of tokens; None: those of the first map
    align_corners: bool = True  # of the bilinear resizing, as Eagle
    projection: Literal["mlp", "fused_mlp"] = "mlp"

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise UserError(f"connector 'channel_concat': side must be positive, not {self.side}")

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return `side` twice, or the first map's grid."""
        return (height, width) if self.side is None else (self.side, self.side)


class ChannelConcatConnector(Connector[ChannelConcatConfig]):
    """Several maps of any grids in; one token per place of the grid they meet on."""

    config_class = ChannelConcatConfig

    def __init__(
        self, config: ChannelConcatConfig, vision_dims: Sequence[int], text_dim: int
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        joined = sum(vision_dims)
        widths = [joined, text_dim, text_dim]
        if config.projection == "fused_mlp":
            widths = [joined, 4 * joined, text_dim, text_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps (T, H_i, W_i, D_i) to tokens (T, N, E)."""
        grid = self.token_grid(*features[0].shape[1:3])
        resized = [self._resize(feature, grid) for feature in features]
        return self.layers(join_channels(resized, self.vision_dims)).flatten(1, 2)

    def _resize(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (T, H_i, W_i, D_i) at another grid; computed in float32."""
        if tuple(features.shape[1:3]) == grid:
            return features
        channels_first = features.permute(0, 3, 1, 2).float()
        corners = self.config.align_corners
        resized = F.interpolate(channels_first, grid, mode="bilinear", align_corners=corners)
        return resized.permute(0, 2, 3, 1).to(features.dtype)

    @classmethod
    def key_tables(cls, config: ChannelConcatConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of Eagle, or of Prismatic and Cobra and of Prismatic's hub port."""
        names = ("weight", "bias")
        if config.projection == "mlp":
            keys = {f"mm_projector.{i}.{n}": f"layers.{i}.{n}" for i in (0, 2) for n in names}
            return {"eagle": keys}
        ported = {0: "fc1", 2: "fc2", 4: "fc3"}
        return {
            "prismatic": {
                f"projector.projector.{i}.{n}": f"layers.{i}.{n}" for i in ported for n in names
            },
            "hf_prismatic": {
                f"projector.{theirs}.{n}": f"layers.{i}.{n}"
                for i, theirs in ported.items()
                for n in names
            },
        }
