"""How does a high-resolution map refine tokens without adding any? Mini-Gemini's patch-info mining.

Shapes: T views, H W low-resolution grid and D its width, H' W' high-resolution grid (a multiple of
H W) and A its width, N = H * W tokens per view, E language-model width.

Each low-resolution feature looks, with one attention head, at the H'/H x W'/W high-resolution
features under it, and what it finds is added to it before a two-layer MLP.
Surprise: in the published HD form the high-resolution encoder sees the whole image once, not each
tile; `project_tiles` takes such a map and cuts it. `project` alone takes one map for every view.

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
from connectors.errors import UserError
from connectors.sva_blocks import cut_windows


@dataclass(frozen=True, kw_only=True)
class MiniGeminiConfig(ConnectorConfig):
    """Nothing to choose: the two maps' grids say how large the windows are."""


class MiniGeminiConnector(Connector[MiniGeminiConfig]):
    """Two maps in, the coarse one first; one token for each of its features."""

    config_class = MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        if len(vision_dims) != 2:
            raise UserError(
                "connector 'minigemini' needs two feature maps, low and high resolution, but the "
                f"vision encoder gives {len(vision_dims)}; choose vision_encoder {{type: several}} "
                "with two encoders"
            )
        low_dim, high_dim = vision_dims
        self.query = nn.Sequential(nn.LayerNorm(low_dim), nn.Linear(low_dim, low_dim))
        self.key = nn.Sequential(nn.LayerNorm(high_dim), nn.Linear(high_dim, low_dim))
        self.value = nn.Sequential(nn.LayerNorm(high_dim), nn.Linear(high_dim, low_dim))
        self.projector = nn.Sequential(
            nn.Linear(low_dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim)
        )

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map a coarse map (T, H, W, D) and a fine one (T, H', W', A) to tokens (T, H * W, E).

        Raises:
            UserError: the fine grid is no multiple of the coarse one.
        """
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
        """Return tokens of the HD form, (n, (1 + G * G) * N, E): the whole image, then each tile.

        Args:
            whole: (n, H, W, D) of n images.
            tiles: (n, G * G, H, W, D) of their tiles, row by row.
            high: (n, G * H', G * W', A) of the whole images at high resolution.

        Raises:
            UserError: the grids are no multiples of each other.
        """
        n, num_tiles, h, w, _ = tiles.shape
        grid = round(num_tiles**0.5)
        fine = (high.shape[1] // grid, high.shape[2] // grid)
        coarse = F.interpolate(high.permute(0, 3, 1, 2).float(), fine, mode="bilinear")
        coarse = coarse.permute(0, 2, 3, 1).to(high.dtype)
        pieces = high.unflatten(2, (grid, fine[1])).unflatten(1, (grid, fine[0])).transpose(2, 3)
        low = torch.cat([whole[:, None], tiles], dim=1).flatten(0, 1)
        high = torch.cat([coarse[:, None], pieces.flatten(1, 2)], dim=1).flatten(0, 1)
        return self.project([low, high]).reshape(n, (1 + num_tiles) * h * w, -1)

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
