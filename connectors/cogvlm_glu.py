"""How does CogVLM make tokens of features? A gated MLP; a token before them, and one behind.

Shapes: T views, H W feature grid, D encoder width, N patches per view, I inner width, E language-
model width.

A linear layer to E, a norm and GELU; then a gated MLP. The N tokens stand between two learned ones,
`boi` and `eoi`. CogVLM2 first merges 2 x 2 features by a convolution (`merge`). With the visual
expert inside the language model (connectors/visual_expert.py) this is CogVLM.
Surprise: no linear layer has a bias, but the norm and the convolution do. In the reference the two
tokens begin as zeros, from which they come away in training; here as a row's end does elsewhere.

Follows GLU and EVA2CLIPModel in `visual.py` of THUDM/cogvlm2-llama3-chat-19B; section 2.1 of
arXiv:2311.03079.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.base import Connector, ConnectorConfig, TokenCells, join_channels, merged_grid
from connectors.config import check_positive
from connectors.key_table import KeyTable, Layout


@dataclass(frozen=True, kw_only=True)
class CogVLMGLUConfig(ConnectorConfig):
    """Whether features are merged, and how wide the gated MLP is."""

    merge: bool = False  # CogVLM2: 2 x 2 features become one
    inner_dim: int | None = None  # I, the language model's own in CogVLM; None: 3.5 E, as CogVLM2's

    def __post_init__(self) -> None:
        inner_dim = 1 if self.inner_dim is None else self.inner_dim
        check_positive("connector 'cogvlm_glu'", inner_dim=inner_dim)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (1, N + 2): the ends belong to no row.

        Raises:
            UserError: the grid is not even, but is to be merged.
        """
        rows, columns, _ = self.token_cells(height, width)
        return 1, rows * columns + 2

    def token_cells(self, height: int, width: int) -> TokenCells:
        """Return where tokens look; the first and the last are of no place."""
        if self.merge:
            height, width = merged_grid("cogvlm_glu", 2, height, width)
        return TokenCells(height, width, (-1, *range(height * width), -1))


class CogVLMGLUConnector(Connector[CogVLMGLUConfig]):
    """Perhaps a convolution; a gated MLP on each feature; a token before them and one behind."""

    config_class = CogVLMGLUConfig

    def __init__(self, config: CogVLMGLUConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        dim, inner = sum(vision_dims), config.inner_dim or int(3.5 * text_dim)
        self.merge = nn.Conv2d(dim, dim, 2, stride=2) if config.merge else None
        self.linear = nn.Linear(dim, text_dim, bias=False)
        self.norm = nn.LayerNorm(text_dim)
        self.gate = nn.Linear(text_dim, inner, bias=False)
        self.up = nn.Linear(text_dim, inner, bias=False)
        self.down = nn.Linear(inner, text_dim, bias=False)
        self.boi = nn.Parameter(torch.randn(1, 1, text_dim) / text_dim**0.5)
        self.eoi = nn.Parameter(torch.randn(1, 1, text_dim) / text_dim**0.5)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, N + 2, E).

        Raises:
            UserError: the grid is not even, but is to be merged.
        """
        joined = join_channels(features, self.vision_dims)
        if self.merge is not None:
            self.token_grid(*joined.shape[1:3])  # for its error: a convolution drops what is left
            joined = self.merge(joined.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.gelu(self.norm(self.linear(joined.flatten(1, 2))))
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        ends = (end.expand(len(x), -1, -1) for end in (self.boi, self.eoi))
        before, behind = (end.to(x.dtype) for end in ends)
        return torch.cat([before, x, behind], dim=1)

    @classmethod
    def key_tables(cls, config: CogVLMGLUConfig) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of CogVLM's checkpoints, or with `merge` of CogVLM2's."""
        theirs = {
            "linear_proj": "linear",
            "gate_proj": "gate",
            "dense_h_to_4h": "up",
            "dense_4h_to_h": "down",
        }
        place = "vision.linear_proj"
        keys: dict[str, str | Layout] = {
            f"{place}.{their}.weight": f"{our}.weight" for their, our in theirs.items()
        }
        keys |= {f"{place}.norm1.{n}": f"norm.{n}" for n in ("weight", "bias")}
        keys |= {f"vision.{end}": end for end in ("boi", "eoi")}
        roots = [place, "vision.boi", "vision.eoi"]
        if config.merge:
            keys |= {f"vision.conv.{n}": f"merge.{n}" for n in ("weight", "bias")}
            roots.append("vision.conv")
        return {"cogvlm2" if config.merge else "cogvlm": KeyTable(keys, roots)}
