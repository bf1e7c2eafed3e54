"""How does a high-resolution map refine tokens without adding any? Mini-Gemini's patch-info mining.

Shapes: T views, H W low-resolution grid and D its width, H' W' high-resolution grid (a multiple of
H W) and A its width, N = H * W tokens per view, E language-model width.

Each low-resolution feature looks, with one attention head, at the H'/H x W'/W high-resolution
features under it, and what it finds is added to it before a two-layer MLP.
With `tiles: 2`, the published HD form, the tokens of the whole view are followed by those of its
2 x 2 tiles. Surprise: the high-resolution encoder then sees the whole view once, not each tile; its
map is cut, and for the whole view's tokens made smaller. The encoder is
`{preset: mini-gemini-two-hd}`, whose low-resolution part gives two maps.

Follows `mgm/model/mgm_arch.py` (unified_resampler, encode_images) of dvlab-research/MGM;
section 3.2 of arXiv:2403.18814. Its `nan_to_num` on the scores is left out: finite features have
finite scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.attention import attend
from connectors.base import Connector, ConnectorConfig
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.sva_blocks import cut_windows


@dataclass(frozen=True, kw_only=True)
class MiniGeminiConfig(ConnectorConfig):
    """Whether tiles are seen; the maps' grids say how large the windows are."""

    tiles: int = 1  # rows, and columns, of tiles beside the whole view (`image_grid`); 1: none

    def __post_init__(self) -> None:
        check_positive("connector 'minigemini'", tiles=self.tiles)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the first map's grid; with tiles theirs, one after another, below it."""
        return (height if self.tiles == 1 else height * (1 + self.tiles**2)), width


class MiniGeminiConnector(Connector[MiniGeminiConfig]):
    """Two maps in, the coarse one first; one token for each of its features.

    With tiles three maps: the whole view's, its tiles' side by side, the fine one.
    """

    config_class = MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        if len(vision_dims) != (2 if config.tiles == 1 else 3):
            raise UserError(
                "connector 'minigemini' needs two feature maps, low and high resolution, but the "
                f"vision encoder gives {len(vision_dims)}; choose vision_encoder {{type: several}} "
                "with two encoders"
                if config.tiles == 1
                else f"connector 'minigemini' with tiles {config.tiles} needs three feature maps, "
                "low resolution of the whole view and of its tiles, and high resolution, but the "
                f"vision encoder gives {len(vision_dims)}; choose vision_encoder {{type: several, "
                f"tiles: [{config.tiles}, 1]}} with two encoders"
            )
        low_dim, high_dim = vision_dims[0], vision_dims[-1]
        self.query = nn.Sequential(nn.LayerNorm(low_dim), nn.Linear(low_dim, low_dim))
        self.key = nn.Sequential(nn.LayerNorm(high_dim), nn.Linear(high_dim, low_dim))
        self.value = nn.Sequential(nn.LayerNorm(high_dim), nn.Linear(high_dim, low_dim))
        self.projector = nn.Sequential(
            nn.Linear(low_dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim)
        )

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map a coarse map (T, H, W, D) and a fine one (T, H', W', A) to tokens (T, H * W, E).

        With tiles there is a map (T, G * H, G * W, D) between the two; see `project_tiles`.

        Raises:
            UserError: the fine grid is no multiple of the coarse one.
        """
        if self.config.tiles > 1:
            return self.project_tiles(*features)
        low, high = features
        return self.projector(low + self.mine(low, high)).flatten(1, 2)

    def mine(self, low: Tensor, high: Tensor) -> Tensor:
        """Return what each feature of (T, H, W, D) finds under it in (T, H', W', A): as the first.

        Raises:
            UserError: the fine grid is no multiple of the coarse one.
        """
        (h, w), (fine_h, fine_w) = low.shape[1:3], high.shape[1:3]
        side = fine_h // h
        if (fine_h, fine_w) != (side * h, side * w):
            raise UserError(
                f"connector 'minigemini': the second feature grid is no multiple of the first, "
                f"{(h, w)}, {(fine_h, fine_w)}; set vision_encoder.resize_to"
            )
        windows = cut_windows(high, side)
        queries = self.query(low).flatten(0, 2)[:, None]  # (T * N, 1, D)
        return attend(queries, self.key(windows), self.value(windows), 1).reshape(low.shape)

    def project_tiles(self, whole: Tensor, tiles: Tensor, high: Tensor) -> Tensor:
        """Return tokens of the HD form, (T, (1 + G * G) * N, E): the whole view, then each tile.

        Args:
            whole: (T, H, W, D).
            tiles: (T, G * H, G * W, D), the features of G x G tiles side by side.
            high: (T, G * H', G * W', A) of the whole views.

        Raises:
            UserError: the grids are no multiples of each other.
        """
        count, (h, w) = self.config.tiles, whole.shape[1:3]
        if tiles.shape[1:3] != (count * h, count * w):
            raise UserError(
                f"connector 'minigemini': tiles {count} of a whole view of {h} x {w} features do "
                f"not make the second map's {tiles.shape[1]} x {tiles.shape[2]}; set "
                f"vision_encoder.tiles to [{count}, 1]"
            )
        fine = (high.shape[1] // count, high.shape[2] // count)
        coarse = F.interpolate(high.permute(0, 3, 1, 2).float(), fine, mode="bilinear")
        coarse = coarse.permute(0, 2, 3, 1).to(high.dtype)
        low = torch.cat([whole[:, None], cut_tiles(tiles, count)], dim=1).flatten(0, 1)
        high = torch.cat([coarse[:, None], cut_tiles(high, count)], dim=1).flatten(0, 1)
        tokens = self.projector(low + self.mine(low, high))
        return tokens.reshape(len(whole), (1 + count**2) * h * w, self.text_dim)

    @classmethod
    def key_tables(cls, config: MiniGeminiConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of Mini-Gemini's checkpoints."""
        names = ("weight", "bias")
        modules = {"query": "query", "aux": "key", "val": "value"}
        keys = {
            f"vlm_uni_{theirs}_projector.{i}.{n}": f"{ours}.{i}.{n}"
            for theirs, ours in modules.items()
            for i in (0, 1)
            for n in names
        }
        keys |= {f"mm_projector.{i}.{n}": f"projector.{i}.{n}" for i in (0, 2) for n in names}
        return {"minigemini": keys}


def cut_tiles(features: Tensor, count: int) -> Tensor:
    """Cut a map (T, G * H, G * W, D) into G x G tiles, row by row: (T, G * G, H, W, D)."""
    rows = features.unflatten(2, (count, -1)).unflatten(1, (count, -1))  # (T, G, H, G, W, D)
    return rows.transpose(2, 3).flatten(1, 2)
