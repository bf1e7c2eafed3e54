"""How does Qwen2-VL merge patches? A norm on each, 2 x 2 of them side by side, an MLP.

Shapes: T views, H W feature grid, D encoder width, R merged rows and columns, N = H * W / R**2
tokens per view, E language-model width.

Surprises:
- The norm comes BEFORE the merge, on D channels; InternVL's pixel shuffle norms R * R * D after it.
- The inner layer is as wide as the merged features, not as the language model.
- The reference's processor hands patches over in blocks already; here they are a grid, and blocks
  are cut from it: (row in block, column in block, channel), as `pixel_shuffle` version "v2".

Follows `modeling_qwen2_vl.py` (PatchMerger), `modeling_qwen2_5_vl.py` and `modeling_qwen3_vl.py` of
transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, join_channels, merged_grid
from connectors.errors import UserError
from connectors.pixel_shuffle import pixel_shuffle


@dataclass(frozen=True, kw_only=True)
class Qwen2VLMergerConfig(ConnectorConfig):
    """How many patches become a token, and which norm they go through."""

    factor: int = 2  # R, the reference's `spatial_merge_size`
    norm: Literal["layer", "rms"] = "layer"  # "rms": Qwen2.5-VL; "layer": Qwen2-VL and Qwen3-VL

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(
                f"connector 'qwen2vl_merger': factor must be at least 1, not {self.factor}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (H / R, W / R).

        Raises:
            UserError: R does not divide the feature grid.
        """
        rows, columns = merged_grid("qwen2vl_merger", self.factor, height, width)
        return rows, columns


class Qwen2VLMergerConnector(Connector[Qwen2VLMergerConfig]):
    """R * R normed features become one token."""

    config_class = Qwen2VLMergerConfig

    def __init__(
        self, config: Qwen2VLMergerConfig, vision_dims: Sequence[int], text_dim: int
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        dim = sum(vision_dims)
        merged = dim * config.factor**2
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.norm = norms[config.norm](dim, eps=1e-6)
        self.layers = nn.Sequential(
            nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, text_dim)
        )

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, H * W / R**2, E)."""
        joined = join_channels(features, self.vision_dims)
        self.token_grid(*joined.shape[1:3])  # refuses a grid that R does not divide
        merged = pixel_shuffle(self.norm(joined), self.config.factor)
        return self.layers(merged).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: Qwen2VLMergerConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of Qwen2-VL and Qwen3-VL, or of Qwen2.5-VL, whose norm is RMS."""
        names = ("weight", "bias")
        linears = [(i, n) for i in (0, 2) for n in names]
        norm = names if config.norm == "layer" else ("weight",)
        qwen2 = {f"visual.merger.ln_q.{n}": f"norm.{n}" for n in norm}
        qwen2 |= {f"visual.merger.mlp.{i}.{n}": f"layers.{i}.{n}" for i, n in linears}
        if config.norm == "rms":
            return {"qwen2_5_vl": qwen2}
        qwen3 = {f"visual.merger.norm.{n}": f"norm.{n}" for n in names}
        qwen3 |= {f"visual.merger.linear_fc{i // 2 + 1}.{n}": f"layers.{i}.{n}" for i, n in linears}
        return {"qwen2_vl": qwen2, "qwen3_vl": qwen3}
