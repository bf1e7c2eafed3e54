"""How does a language model get second weights for image tokens? CogVLM's visual expert.

Shapes: B batch, L sequence, K image tokens of the batch, C channels in, F channels out.

At every linear layer of the decoder layers, image tokens go through one of their own, which begins
as a copy; text never meets it, so that the language model stays as it was without an image. The
blocks, and what surprises in them, are in connectors/visual_expert_blocks.py. Positions are not
shared between the patches of an image here.

Follows `modeling_cogvlm.py` of THUDM/cogvlm2-llama3-chat-19B; section 2.1 of arXiv:2311.03079.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig
from connectors.errors import UserError
from connectors.fusion import (
    ROLES,
    FusionContext,
    HostShape,
    LinearSite,
    Role,
    check_roles,
    linears_of,
)
from connectors.key_table import Layout
from connectors.partial_lora import names_by_role
from connectors.visual_expert_blocks import (
    ExpertShape,
    LayerExperts,
    copy_linear,
    key_of,
    visual_expert_keys,
)


@dataclass(frozen=True, kw_only=True)
class VisualExpertConfig(ConnectorConfig):
    """Which linear layers have an expert, and for which tokens."""

    linears: tuple[Role, ...] = ROLES
    qkv_bias: bool = False  # CogVLM2: experts of queries, keys and values add a bias
    last_token: bool = False  # whether the last token of an image goes through the expert too

    def __post_init__(self) -> None:
        check_roles("connector 'visual_expert'", self.linears)


class VisualExpertConnector(Connector[VisualExpertConfig]):
    """`LayerExperts` for each decoder layer; they stand for its linear layers at image tokens."""

    config_class = VisualExpertConfig
    faces = frozenset({"on_linear"})
    replaces_linear = True

    def __init__(
        self,
        config: VisualExpertConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape,
    ) -> None:
        """Build the experts of the linear layers of `host`."""
        super().__init__(config, vision_dims, text_dim)
        self.host = host
        linears = linears_of(host, config.linears)
        self.layers = nn.ModuleList(
            LayerExperts(
                [
                    ExpertShape(
                        x.name,
                        x.in_dim,
                        x.out_dim,
                        x.bias or (config.qkv_bias and bool(set(x.roles) & {"q", "k", "v"})),
                    )
                    for x in layer
                ]
            )
            for layer in linears
        )
        self._sites = [LinearSite(i, x.name) for i, layer in enumerate(linears) for x in layer]

    @classmethod
    def build(
        cls,
        config: VisualExpertConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape | None,
    ) -> Self:
        """Build for the language model `host`."""
        assert host is not None
        return cls(config, vision_dims, text_dim, host)

    def begin_from(self, linear_at: Callable[[LinearSite], nn.Module]) -> None:
        """Begin every expert as the linear layer that it stands for.

        Raises:
            UserError: its weights are packed.
        """
        for site in self._sites:
            base = linear_at(site)
            if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
                raise UserError(
                    f"connector 'visual_expert' begins as a copy of the language model's layers, "
                    f"but layer {site.layer}'s {site.name} is quantised; build the model without "
                    "quantisation, save it, and load that quantised"
                )
            copy_linear(self._expert(site), base)

    def _expert(self, site: LinearSite) -> nn.Linear:
        layer: LayerExperts = self.layers[site.layer]  # pyright: ignore
        return layer.linears[key_of(site.name)]  # pyright: ignore

    def linear_sites(self) -> Sequence[LinearSite]:
        """Return the linear layers with an expert."""
        return self._sites

    def linear_rows(self, context: FusionContext) -> Tensor:
        """Return the image tokens (K,), without the last of each image unless it is asked for."""
        return context.rows if self.config.last_token else context.inner_rows

    def linear_apply(self, site: LinearSite, x: Tensor) -> Tensor:
        """Map image tokens (K, C) to (K, F)."""
        return self.layers[site.layer](site.name, x)

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return CogVLM's keys."""
        host = self.host
        names = names_by_role(host, self.config.linears, "layers.{}.linears.")
        q, kv = host.num_heads * host.head_dim, host.num_key_heads * host.head_dim
        return dict(visual_expert_keys(names, (q, kv, kv), qkv_bias=self.config.qkv_bias))
