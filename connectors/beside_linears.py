"""What do connectors share that stand beside a language model's linear layers?

Shapes: K image tokens of the batch, C channels in, F channels out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from connectors.base import ConnectorConfig, InsideConnector
from connectors.errors import UserError
from connectors.fusion import ROLES, HostLinear, HostShape, LinearSite, Role, linears_of


@dataclass(frozen=True, kw_only=True)
class LinearsConfig(ConnectorConfig):
    """Which of the language model's linear layers have something beside them."""

    linears: tuple[Role, ...] = ROLES

    def __post_init__(self) -> None:
        if not self.linears:
            raise UserError(f"connector: linears names no linear layer of {', '.join(ROLES)}")
        if twice := [role for role in ROLES if self.linears.count(role) > 1]:
            raise UserError(f"connector: linears names {twice[0]!r} twice")


C = TypeVar("C", bound=LinearsConfig)


class LinearsConnector(InsideConnector[C]):
    """Base of connectors with a module beside each linear layer, for image tokens."""

    faces = frozenset({"on_linear"})

    def __init__(
        self, config: C, vision_dims: Sequence[int], text_dim: int, host: HostShape
    ) -> None:
        """Build the modules beside the linear layers of `host`."""
        super().__init__(config, vision_dims, text_dim, host)
        linears = linears_of(host, config.linears)
        self.layers = nn.ModuleList(
            nn.ModuleDict({key_of(linear.name): self.beside(linear) for linear in layer})
            for layer in linears
        )
        self._sites = [LinearSite(i, x.name) for i, layer in enumerate(linears) for x in layer]

    def beside(self, linear: HostLinear) -> nn.Module:
        """Return what stands beside a linear layer: (K, C) -> (K, F)."""
        raise NotImplementedError

    def at(self, site: LinearSite) -> nn.Module:
        """Return the module beside a linear layer."""
        layer: nn.ModuleDict = self.layers[site.layer]  # pyright: ignore[reportAssignmentType]
        return layer[key_of(site.name)]

    def linear_sites(self) -> Sequence[LinearSite]:
        """Return the linear layers with a module beside them."""
        return self._sites

    def linear_apply(self, site: LinearSite, x: Tensor) -> Tensor:
        """Map the inputs of chosen tokens (K, C) to (K, F)."""
        return self.at(site)(x)

    def names_by_role(self) -> list[dict[Role, str]]:
        """Return, for each decoder layer, {role: name of the module that serves it, and a dot}."""
        return [
            {
                role: f"layers.{i}.{key_of(linear.name)}."
                for linear in layer
                for role in linear.roles
                if role in self.config.linears
            }
            for i, layer in enumerate(linears_of(self.host, self.config.linears))
        ]


def key_of(name: str) -> str:
    """Return a path as the name of a module, which has no dots."""
    return name.replace(".", "_")


def published_modules(
    layers: Sequence[Mapping[Role, str]], published: Mapping[str, tuple[Role, ...]]
) -> dict[str, list[str]] | None:
    """Return {place of a published module: the names of ours that it is, in its order}.

    Args:
        layers: what `names_by_role` gives.
        published: the linear layers of a decoder layer in published checkpoints, and what each
            computes; ours may be finer, never coarser.

    Returns:
        None where a module of ours is several published ones, or a published one is ours in part.
    """
    modules = {}
    for i, names in enumerate(layers):
        for linear, roles in published.items():
            ours = list(dict.fromkeys(names[role] for role in roles if role in names))
            served = {role for role in names if names[role] in ours}
            if ours and served != set(roles):
                return None
            if ours:
                modules[f"model.layers.{i}.{linear}"] = ours
    return modules
