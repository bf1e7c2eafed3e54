"""How does a language model get second weights for image tokens? CogVLM's visual expert.

Shape: K image tokens of the batch.

At every linear layer of the decoder layers, image tokens go through one of their own, which begins
as a copy; text never meets it, so that the language model stays as it was without an image. The
blocks, and what surprises in them, are in connectors/visual_expert_blocks.py.

CogVLM is `[{type: cogvlm_glu}, {type: visual_expert, shared_positions: true}]`, one view an image:
all tokens of an image but the first and the last, `boi` and `eoi`, share one position.

Follows `modeling_cogvlm.py` of THUDM/cogvlm2-llama3-chat-19B; section 2.1 of arXiv:2311.03079.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from connectors.beside_linears import LinearsConfig, LinearsConnector
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostLinear, LinearSite
from connectors.key_table import Layout
from connectors.visual_expert_blocks import copy_linear, visual_expert_keys


@dataclass(frozen=True, kw_only=True)
class VisualExpertConfig(LinearsConfig):
    """Which linear layers have an expert, and for which tokens."""

    qkv_bias: bool = False  # CogVLM2: experts of queries, keys and values add a bias
    last_token: bool = False  # whether the last token of an image goes through the expert too
    shared_positions: bool = False  # whether an image's tokens between first and last share one


class VisualExpertConnector(LinearsConnector[VisualExpertConfig]):
    """A second linear layer for each of the language model's; it stands for it at image tokens."""

    config_class = VisualExpertConfig
    replaces_linear = True

    def beside(self, linear: HostLinear) -> nn.Module:
        """Return the expert of a linear layer."""
        of_attention = bool(set(linear.roles) & {"q", "k", "v"})
        bias = linear.bias or (self.config.qkv_bias and of_attention)
        return nn.Linear(linear.in_dim, linear.out_dim, bias=bias)

    def begin_from(self, linear_at: Callable[[LinearSite], nn.Module]) -> None:
        """Begin every expert as the linear layer that it stands for.

        Raises:
            UserError: its weights are packed.
        """
        for site in self.linear_sites():
            base, expert = linear_at(site), self.at(site)
            if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
                raise UserError(
                    f"connector 'visual_expert' begins as a copy of the language model's layers, "
                    f"but layer {site.layer}'s {site.name} is quantised; build the model without "
                    "quantisation, save it, and load that quantised"
                )
            assert isinstance(expert, nn.Linear), expert
            copy_linear(expert, base)

    @property
    def shares_positions(self) -> bool:
        """Return whether the inner tokens of an image share one position."""
        return self.config.shared_positions

    def linear_rows(self, context: FusionContext) -> Tensor:
        """Return the image tokens (K,), without the last of each image unless it is asked for."""
        return context.rows if self.config.last_token else context.inner_rows

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return CogVLM's keys."""
        host = self.host
        q, kv = host.num_heads * host.head_dim, host.num_key_heads * host.head_dim
        names = self.names_by_role()
        return dict(visual_expert_keys(names, (q, kv, kv), qkv_bias=self.config.qkv_bias))
