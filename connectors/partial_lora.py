"""How does a language model get weights of its own for image tokens, at little cost? Partial LoRA.

Shapes: B batch, L sequence, K image tokens of the batch, R rank.

Every linear layer of the decoder layers adds a product of two small matrices to what it makes of
image tokens; text tokens pass as without it. The cost is that of the image tokens alone.
The matrices, and what the reference does otherwise, are in connectors/token_routed_linear.py.

Follows the class PLoRA of InternLM/InternLM-XComposer (`build_mlp.py`); section 3.2 of
arXiv:2401.16420.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import ROLES, HostShape, LinearSite, Role, check_roles, linears_of
from connectors.key_table import Layout
from connectors.token_routed_linear import LowRank, partial_lora_keys
from connectors.visual_expert_blocks import key_of


@dataclass(frozen=True, kw_only=True)
class PartialLoraConfig(ConnectorConfig):
    """How large the small matrices are, and where they are."""

    rank: int = 256  # R
    alpha: float = 256.0  # what is added is scaled by alpha / rank
    dropout: float = 0.05  # of the input of the small matrices
    linears: tuple[Role, ...] = ROLES

    def __post_init__(self) -> None:
        check_positive("connector 'partial_lora'", rank=self.rank)
        check_roles("connector 'partial_lora'", self.linears)
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"connector 'partial_lora': dropout must be at least 0 and below 1, not "
                f"{self.dropout}"
            )


class PartialLoraConnector(Connector[PartialLoraConfig]):
    """A `LowRank` beside each linear layer, for image tokens."""

    config_class = PartialLoraConfig
    faces = frozenset({"on_linear"})

    def __init__(
        self,
        config: PartialLoraConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape,
    ) -> None:
        """Build the small matrices beside the linear layers of `host`."""
        super().__init__(config, vision_dims, text_dim)
        self.host = host
        linears = linears_of(host, config.linears)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    key_of(x.name): LowRank(
                        x.in_dim, x.out_dim, config.rank, config.alpha, config.dropout
                    )
                    for x in layer
                }
            )
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
        return cls(config, vision_dims, text_dim, host)

    def linear_sites(self) -> Sequence[LinearSite]:
        """Return the linear layers with small matrices beside them."""
        return self._sites

    def linear_apply(self, site: LinearSite, x: Tensor) -> Tensor:
        """Map the inputs of image tokens (K, in) to what is added, (K, out)."""
        layer: nn.ModuleDict = self.layers[site.layer]  # pyright: ignore
        return layer[key_of(site.name)](x)

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return XComposer2's keys, if the language model's heads are known."""
        host = self.host
        layers = names_by_role(host, self.config.linears)
        return partial_lora_keys(layers, host.num_key_heads, host.head_dim)


def names_by_role(
    host: HostShape, roles: Sequence[Role], place: str = "layers.{}."
) -> list[dict[str, str]]:
    """Return, for each decoder layer, {role: name of the module beside its linear layer, a dot}."""
    return [
        {
            role: f"{place.format(i)}{key_of(linear.name)}."
            for linear in layer
            for role in linear.roles
            if role in roles
        }
        for i, layer in enumerate(linears_of(host, roles))
    ]
