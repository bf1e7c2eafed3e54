"""How do several connectors work as one? A list: some project, the others act inside the LM.

Shapes: T views, H W feature grid, D encoder width, N tokens per view, E language-model width, B
batch, L sequence.

`connector: [{type: mlp}, {type: partial_lora}]` is XComposer2; `[{type: perceiver}, {type:
gated_cross_attention}]` is Flamingo. Exactly one part projects to tokens; a part that takes tokens
gets them instead of the sequence; there is one such part at most. Each part sees all feature maps,
or those that its key `features` names: `[{type: mlp, features: [3]}, {type: deepstack, features:
[0, 1, 2]}]`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from connectors.base import Connector, ConnectorConfig, TokenCells
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, LinearSite, Where
from connectors.views import NOTHING_KNOWN, Reading, TextSource, Views


@dataclass(frozen=True)
class Part:
    """One entry of the list, checked.

    Attributes:
        name: its type.
        connector_class: what the type names.
        config: its own numbers.
        features: which feature maps it sees, counted from 0; None: all.
    """

    name: str
    connector_class: type[Connector]
    config: ConnectorConfig
    features: tuple[int, ...] | None

    def choose(self, maps: Sequence) -> list:
        """Return what stands for the feature maps that this part sees.

        Raises:
            UserError: there are fewer.
        """
        if self.features is None:
            return list(maps)
        if max(self.features) >= len(maps) or min(self.features) < 0:
            raise UserError(
                f"connector {self.name!r}: features {list(self.features)} counts from 0, but the "
                f"vision encoder gives {len(maps)} feature maps; name others, or more layers or "
                "encoders in vision_encoder"
            )
        return [maps[i] for i in self.features]

    def choose_views(self, views: Views) -> Views:
        """Return what is known of the views, for the feature maps that this part sees."""
        return views if views.shown is None else replace(views, shown=self.choose(views.shown))


@dataclass(frozen=True, kw_only=True)
class ChainConfig(ConnectorConfig):
    """The parts, in order."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        projecting = [part.name for part in self.parts if "project" in part.connector_class.faces]
        if len(projecting) != 1:
            raise UserError(
                f"a list of connectors needs exactly one that projects features to tokens, but "
                f"{[part.name for part in self.parts]} has {len(projecting)} ({projecting})"
                + ("; put {type: mlp} before the others" if not projecting else "")
            )
        names = [part.name for part in self.parts]
        taking = [part.name for part in self.parts if part.connector_class.takes_tokens]
        if len(taking) > 1:
            raise UserError(f"connectors {taking} each take the tokens of a view; leave one")
        if taking and names.index(taking[0]) < names.index(projecting[0]):
            raise UserError(
                f"connector {taking[0]!r} takes the tokens of one before it: write a list such as "
                f"[{{type: {projecting[0]}}}, {{type: {taking[0]}}}]"
            )
        rows = [part.name for part in self.parts if part.connector_class.side_kind == "tokens"]
        if taking and rows:
            raise UserError(
                f"connector {rows[0]!r} gives something to each image token in the sequence, but "
                f"{taking[0]!r} takes the tokens out of it; leave one of the two"
            )

    def view_token_cells(self, grids: Sequence[tuple[int, int]]) -> TokenCells | None:
        """Return where the tokens look that stand in the sequence; taken ones do not."""
        if self.taking is not None:
            return None
        return self.maker.config.token_cells(*self.maker.choose(grids)[0])

    @property
    def maker(self) -> Part:
        """Return the part that projects features to tokens."""
        (maker,) = (part for part in self.parts if "project" in part.connector_class.faces)
        return maker

    @property
    def taking(self) -> Part | None:
        """Return the part that takes the tokens instead of the sequence."""
        return next((part for part in self.parts if part.connector_class.takes_tokens), None)

    def view_token_grid(self, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of one view whose features have these grids.

        Raises:
            UserError: a part cannot take such a grid.
        """
        maker = self.maker
        grid = maker.config.token_grid(*maker.choose(grids)[0])
        for part in self.parts:
            if part is maker or part.connector_class.side_kind != "tokens":
                continue
            for own in (part.config.token_grid(*one) for one in part.choose(grids)):
                if own != grid:
                    raise UserError(
                        f"connector {part.name!r} makes {own[0]} x {own[1]} tokens of a view, but "
                        f"{grid[0]} x {grid[1]} of {maker.name!r} stand in the sequence; give both "
                        "the same factor, or name feature maps of one grid in features"
                    )
        taking = self.taking
        return grid if taking is None else taking.config.token_grid(*grid)

    def text_source(self) -> TextSource | None:
        """Return how the text is made that a part reads; one part alone projects."""
        return next(filter(None, (part.config.text_source() for part in self.parts)), None)


class Plugged(NamedTuple):
    """What a chain makes of features."""

    tokens: Tensor  # (T, N, E), for the sequence
    sides: dict[int, Sequence[Tensor]]  # what parts inside the language model read, by number


class ConnectorChain(Connector[ChainConfig]):
    """Several connectors in a row; `forward` gives tokens and what the layers will read."""

    config_class = ChainConfig

    def __init__(
        self,
        config: ChainConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape | None = None,
    ) -> None:
        """Build the parts; `host` is needed where one acts inside the language model."""
        super().__init__(config, vision_dims, text_dim)
        built = []
        for part in config.parts:
            if host is None and part.connector_class.faces - {"project"}:
                raise UserError(
                    f"connector {part.name!r} acts inside the language model, which has to be "
                    "known to build it"
                )
            dims = part.choose(vision_dims)
            width, taking = text_dim, config.taking
            if taking is not None and "project" in part.connector_class.faces:
                width = taking.connector_class.media_dim(taking.config, taking.choose(vision_dims))
            built.append(part.connector_class.build(part.config, dims, width, host))
        self.parts: Sequence[Connector] = nn.ModuleList(built)  # pyright: ignore
        self._layers: dict[tuple[int, Where], list[tuple[int, LayerSite]]] = {}
        self._linears: dict[tuple[int, str], list[tuple[int, LinearSite]]] = {}
        for number, part in enumerate(built):
            for site in part.layer_sites():
                self._layers.setdefault((site.layer, site.where), []).append((number, site))
            for site in part.linear_sites():
                self._linears.setdefault((site.layer, site.name), []).append((number, site))
        for (layer, name), found in self._linears.items():
            if len(found) > 1 and any(built[number].replaces_linear for number, _ in found):
                names = [config.parts[number].name for number, _ in found]
                raise UserError(f"connectors {names} want layer {layer}'s {name} each for itself")

    @property
    def acts_inside(self) -> bool:
        """Return whether any part acts inside the language model."""
        return bool(self._layers or self._linears)

    @property
    def shares_positions(self) -> bool:
        """Return whether any part wants the inner tokens of an image to share one position."""
        return any(part.shares_positions for part in self.parts)

    @property
    def layer_places(self) -> set[tuple[int, Where]]:
        """Return the places at decoder layers where a part acts."""
        return set(self._layers)

    @property
    def linear_places(self) -> set[tuple[int, str]]:
        """Return (layer, path) of the linear layers that a part serves."""
        return set(self._linears)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of one view, if all maps have this grid."""
        return self.view_token_grid([(height, width)] * len(self.vision_dims))

    def view_token_grid(self, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of one view whose features have these grids."""
        return self.config.view_token_grid(grids)

    def view_token_cells(self, grids: Sequence[tuple[int, int]]) -> TokenCells | None:
        """Return where the tokens look that stand in the sequence."""
        return self.config.view_token_cells(grids)

    @property
    def reads(self) -> frozenset[Reading]:
        """Return what of `Views` any part wants to know."""
        return frozenset[Reading]().union(*(part.reads for part in self.parts))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, features: Sequence[Tensor], views: Views = NOTHING_KNOWN
    ) -> Plugged:
        """Map feature maps (T, H, W, D_i) to tokens (T, N, E) and to what the layers read."""
        tokens: Tensor | None = None
        sides: dict[int, Sequence[Tensor]] = {}
        for number, (part, spec) in enumerate(zip(self.parts, self.config.parts, strict=True)):
            chosen, known = spec.choose(features), spec.choose_views(views)
            if "project" in part.faces and part.side_kind != "none":
                tokens, sides[number] = part.project_and_side(chosen, known)
            elif "project" in part.faces:
                tokens = part(chosen, known)
            elif part.side_kind != "none":
                sides[number] = part.side(chosen, tokens)
            if part.takes_tokens:
                assert tokens is not None, "checked when the config was read"
                tokens = part.replace_tokens(tokens)
        assert tokens is not None, "checked when the config was read"
        return Plugged(tokens, sides)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps (T, H, W, D_i) to the tokens that stand in the sequence, (T, N, E)."""
        return self.forward(features).tokens

    @property
    def _ending(self) -> Connector | None:
        """Return the part whose tokens stand in the sequence as it projected them."""
        if self.config.taking is not None:
            return None
        return next(part for part in self.parts if "project" in part.faces)

    @property
    def row_end_dim(self) -> int:
        """Return the width of row ends that are learned before the last projection."""
        return self.text_dim if self._ending is None else self._ending.row_end_dim

    def project_row_ends(self, learned: Tensor) -> Tensor:
        """Map row ends (K, C), learned before the last projection, to tokens (K, E)."""
        return learned if self._ending is None else self._ending.project_row_ends(learned)

    def apply_layer(
        self, layer: int, where: Where, hidden: Tensor, context: FusionContext
    ) -> Tensor:
        """Return hidden states (B, L, E) after all parts that act at this place."""
        for number, site in self._layers.get((layer, where), ()):
            side = context.sides.get(number)
            hidden = self.parts[number].layer_apply(site, hidden, context, side)
        return hidden

    def linear_parts(self, layer: int, name: str) -> list[tuple[Connector, LinearSite]]:
        """Return the parts that serve a linear layer, with their site."""
        return [(self.parts[n], site) for n, site in self._linears.get((layer, name), ())]

    def begin_from(self, linear_at: Callable[[LinearSite], nn.Module]) -> None:
        """Let the parts' new weights begin as those of the language model's linear layers."""
        for part in self.parts:
            part.begin_from(linear_at)

    def by_kind(self, kind: str) -> Mapping[int, Connector]:
        """Return the parts whose `side_kind` is `kind`, by number."""
        return {n: part for n, part in enumerate(self.parts) if part.side_kind == kind}
