"""What is the usual connector? An MLP on every feature, GELU between its layers (LLaVA 1.5).

Shapes: T views, H W feature grid, D encoder width, N = H * W tokens per view, E language-model
width.
Follows `llava/model/multimodal_projector/builder.py` of haotian-liu/LLaVA, `mlp{depth}x_gelu`: the
first layer goes from D to E, all others from E to E; GELU is the exact (erf) one; bias everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, join_channels
from connectors.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MLPConfig(ConnectorConfig):
    """How many linear layers the MLP has."""

    depth: int = 2  # linear layers; 1 is LLaVA's "mlp1x_gelu": a linear layer under the MLP's keys

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"connector 'mlp': depth must be at least 1, not {self.depth}")


class MLPConnector(Connector[MLPConfig]):
    """Linear layers with GELU between them; one token per feature."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        layers: list[nn.Module] = [nn.Linear(sum(vision_dims), text_dim)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        self.layers = nn.Sequential(*layers)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps, each (T, H, W, D_i), to tokens (T, H * W, E)."""
        return self.layers(join_channels(features, self.vision_dims)).flatten(1, 2)

    @classmethod
    def key_tables(cls, config: MLPConfig) -> Mapping[str, Mapping[str, str]]:
        """Return the keys of LLaVA's `mm_projector` and, at depth 2, of transformers' port."""
        # Sequential counts the GELUs: the linear layers stand at 0, 2, 4, ...
        names = ("weight", "bias")
        positions = range(0, 2 * config.depth, 2)
        tables = {
            "llava": {f"mm_projector.{i}.{n}": f"layers.{i}.{n}" for i in positions for n in names}
        }
        if config.depth == 2:
            tables["hf_llava"] = {
                f"multi_modal_projector.linear_{i // 2 + 1}.{n}": f"layers.{i}.{n}"
                for i in positions
                for n in names
            }
        return tables
