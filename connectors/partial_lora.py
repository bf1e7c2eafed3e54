"""How does a language model get weights of its own for image tokens, at little cost? Partial LoRA.

Shapes: B batch, L sequence, K image tokens of the batch, R rank.

Every linear layer of the decoder layers adds a product of two small matrices to what it makes of
image tokens; text tokens pass as without it. The cost is that of the image tokens alone.
Surprise: the second matrix begins as zeros. In the reference it does not (its `reset_parameters`
asks for an attribute that is spelt differently), which no one wants.

Follows the class PLoRA of InternLM/InternLM-XComposer (`build_mlp.py`); section 3.2 of
arXiv:2401.16420.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import (
    ROLES,
    HostLinear,
    HostShape,
    LinearSite,
    Role,
    linears_of,
)


@dataclass(frozen=True, kw_only=True)
class PartialLoraConfig(ConnectorConfig):
    """How large the small matrices are, and where they are."""

    rank: int = 256  # R
    alpha: float = 256.0  # what is added is scaled by alpha / rank
    dropout: float = 0.05  # of the input of the small matrices
    linears: tuple[Role, ...] = ROLES

    def __post_init__(self) -> None:
        check_positive("connector 'partial_lora'", rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"connector 'partial_lora': dropout must be at least 0 and below 1, not "
                f"{self.dropout}"
            )


class LowRank(nn.Module):
    """Two linear layers without bias, the second begun as zeros."""

    def __init__(self, in_dim: int, out_dim: int, config: PartialLoraConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(in_dim, config.rank, bias=False)
        self.up = nn.Linear(config.rank, out_dim, bias=False)
        self.scale = config.alpha / config.rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (K, in) to (K, out)."""
        return self.up(self.down(self.dropout(x))) * self.scale


class PartialLoraConnector(Connector[PartialLoraConfig]):
    """A `LowRank` beside each linear layer, for image tokens."""

    config_class = PartialLoraConfig
    faces = frozenset({"on_linear"})

    def __init__(
        self,
        config: PartialLoraConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        linears: Sequence[Sequence[HostLinear]],
    ) -> None:
        """Build the small matrices beside `linears`, those of each decoder layer."""
        super().__init__(config, vision_dims, text_dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict({key_of(x.name): LowRank(x.in_dim, x.out_dim, config) for x in layer})
            for layer in linears
        )
        self._sites = [LinearSite(i, x.name) for i, layer in enumerate(linears) for x in layer]

    @classmethod
    def build(
        cls,
        config: PartialLoraConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape | None,
    ) -> Self:
        """Build for the language model `host`."""
        assert host is not None
        return cls(config, vision_dims, text_dim, linears_of(host, config.linears))

    def linear_sites(self) -> Sequence[LinearSite]:
        """Return the linear layers with small matrices beside them."""
        return self._sites

    def linear_apply(self, site: LinearSite, x: Tensor) -> Tensor:
        """Map the inputs of image tokens (K, in) to what is added, (K, out)."""
        layer: nn.ModuleDict = self.layers[site.layer]  # pyright: ignore
        return layer[key_of(site.name)](x)


def key_of(name: str) -> str:
    """Return a path as the name of a module, which has no dots."""
    return name.replace(".", "_")
