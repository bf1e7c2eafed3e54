"""How does a language model get weights of its own for image tokens, at little cost? Partial LoRA.

Shape: R rank.

Every linear layer of the decoder layers adds a product of two small matrices to what it makes of
image tokens; text tokens pass as without it. The cost is that of the image tokens alone.
The matrices, and what the reference does otherwise, are in connectors/token_routed_linear.py.

Follows the class PLoRA of InternLM/InternLM-XComposer (`build_mlp.py`); section 3.2 of
arXiv:2401.16420.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from connectors.beside_linears import LinearsConfig, LinearsConnector
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import HostLinear
from connectors.key_table import Layout
from connectors.token_routed_linear import LowRank, partial_lora_keys


@dataclass(frozen=True, kw_only=True)
class PartialLoraConfig(LinearsConfig):
    """How large the small matrices are, and where they are."""

    rank: int = 256  # R
    alpha: float = 256.0  # what is added is scaled by alpha / rank
    dropout: float = 0.05  # of the input of the small matrices

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("connector 'partial_lora'", rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"connector 'partial_lora': dropout must be at least 0 and below 1, not "
                f"{self.dropout}"
            )


class PartialLoraConnector(LinearsConnector[PartialLoraConfig]):
    """A `LowRank` beside each linear layer, for image tokens."""

    config_class = PartialLoraConfig

    def beside(self, linear: HostLinear) -> nn.Module:
        """Return the small matrices of a linear layer, for what is added at image tokens."""
        config = self.config
        return LowRank(linear.in_dim, linear.out_dim, config.rank, config.alpha, config.dropout)

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return XComposer2's keys."""
        names, host = self.names_by_role(), self.host
        return dict(partial_lora_keys(names, host.num_key_heads, host.head_dim))
