"""How are neighbouring patches merged into fewer tokens? Pixel shuffle, then a projection.

Shapes: T views, H W feature grid, D encoder width, R shuffle factor, N = H * W / R**2 tokens per
view, E language-model width.

Surprises:
- Channels are ordered (row in block, column in block, channel). `torch.nn.PixelUnshuffle` orders
  (channel, row, column): weights loaded across that difference give garbage without an error.
- InternVL's version "v1" leaves the token grid TRANSPOSED, (W / R, H / R): token j * (H / R) + i
  shows block row i, block column j. Its config says `ps_version`; never guess it. Idefics3 is "v2".

Follows InternVL `modeling_internvl_chat.py` (pixel_shuffle, mlp1) and transformers'
`modeling_idefics3.py` (Idefics3Connector), XComposer2-4KHD `build_mlp.py` (merge) and
`vision_proj`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, TokenCells, join_channels, merged_grid
from connectors.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(ConnectorConfig):
    """How much is merged, in which token order, and what projects the merged features."""

    factor: int = 2  # R: each view has R * R times fewer tokens, each R * R times wider
    version: Literal["v1", "v2"] = "v2"  # "v1" only for old InternVL checkpoints
    # "mlp": LayerNorm, Linear, GELU, Linear (InternVL); "plain_mlp": the same without the norm
    # (XComposer2-4KHD); "linear": one Linear, no bias (Idefics3)
    projection: Literal["mlp", "plain_mlp", "linear"] = "mlp"

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(
                f"connector 'pixel_shuffle': factor must be at least 1, not {self.factor}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (H / R, W / R), or (W / R, H / R) for "v1".

        Raises:
            UserError: R does not divide the feature grid.
        """
        rows, columns = merged_grid("pixel_shuffle", self.factor, height, width)
        return (columns, rows) if self.version == "v1" else (rows, columns)

    def token_cells(self, height: int, width: int) -> TokenCells | None:
        """Return where tokens look: row by row, or for "v1" column by column."""
        rows, columns = merged_grid("pixel_shuffle", self.factor, height, width)
        if self.version == "v2":
            return TokenCells(rows, columns, tuple(range(rows * columns)))
        cells = (i * columns + j for j in range(columns) for i in range(rows))
        return TokenCells(rows, columns, tuple(cells))


def pixel_shuffle(features: Tensor, factor: int, version: Literal["v1", "v2"] = "v2") -> Tensor:
    """Merge blocks of R x R features into channels.

    Returns:
        (T, H / R, W / R, R * R * D), with the first two transposed for "v1". For R = 2 the features
        at (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1) are concatenated in that order.
    """
    t, h, w, d = features.shape
    r = factor
    blocks = features.reshape(t, h // r, r, w // r, r, d)
    if version == "v1":
        merged = blocks.permute(0, 3, 1, 2, 4, 5)  # (T, W/R, H/R, R, R, D)
    else:
        merged = blocks.permute(0, 1, 3, 2, 4, 5)  # (T, H/R, W/R, R, R, D)
    return merged.reshape(*merged.shape[:3], r * r * d)


class PixelShuffleConnector(Connector[PixelShuffleConfig]):
    """Pixel shuffle and a projection; R * R features become one token."""

    config_class = PixelShuffleConfig

    def __init__(
        self, config: PixelShuffleConfig, vision_dims: Sequence[int], text_dim: int
    ) -> None:
        super().__init__(config, vision_dims, text_dim)
        merged_dim = self.row_end_dim
        if config.projection == "linear":
            self.layers = nn.Sequential(nn.Linear(merged_dim, text_dim, bias=False))
            return
        norm = [nn.LayerNorm(merged_dim, eps=1e-5)] if config.projection == "mlp" else []
        self.layers = nn.Sequential(
            *norm, nn.Linear(merged_dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim)
        )

    @property
    def row_end_dim(self) -> int:
        """Return R * R * D, the width of the merged features."""
        return sum(self.vision_dims) * self.config.factor**2

    def project_row_ends(self, learned: Tensor) -> Tensor:
        """Map row ends (K, R * R * D), learned beside the merged features, to tokens (K, E)."""
        return self.layers(learned)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, H * W / R**2, E)."""
        joined = join_channels(features, self.vision_dims)
        self.token_grid(*joined.shape[1:3])  # refuses a grid that R does not divide
        merged = pixel_shuffle(joined, self.config.factor, self.config.version)
        return self.layers(merged).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: PixelShuffleConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of InternVL's `mlp1` and its port, of Idefics3, or of XComposer2-4KHD."""
        if config.projection == "linear":
            if config.version == "v1":
                return {}  # no published checkpoint has it
            key = "model.connector.modality_projection.proj.weight"
            return {"idefics3": {key: "layers.0.weight"}}
        if config.projection == "plain_mlp":
            names = [f"{i}.{n}" for i in (0, 2) for n in ("weight", "bias")]
            return {"xcomposer2": {f"vision_proj.{name}": f"layers.{name}" for name in names}}
        ported = {0: "layer_norm", 1: "linear_1", 3: "linear_2"}
        names = ("weight", "bias")
        tables = {"internvl": {f"mlp1.{i}.{n}": f"layers.{i}.{n}" for i in ported for n in names}}
        if config.version == "v2":  # the port has no other
            tables["hf_internvl"] = {
                f"multi_modal_projector.{theirs}.{n}": f"layers.{i}.{n}"
                for i, theirs in ported.items()
                for n in names
            }
        return tables
