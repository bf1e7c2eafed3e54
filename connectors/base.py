"""What must every connector do? Fill one or more of three faces, and say its numbers exactly.

- `project`: turn encoder features into tokens before the language model.
- `in_layer`: change hidden states before, in or after its decoder layers.
- `on_linear`: add to, or replace, what its linear layers make of image tokens.

A connector with the last two faces alone needs one that projects before it in the recipe's list:
`connector: [{type: mlp}, {type: partial_lora}]` (connectors/chain.py).

Shapes: T views, H W feature grid, D encoder width, N tokens per view, E language-model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, LinearSite, Media
from connectors.key_table import Layout
from connectors.views import NOTHING_KNOWN, Reading, TextSource, Views

Face = Literal["project", "in_layer", "on_linear"]


class TokenCells(NamedTuple):
    """Which part of a view each of its tokens was made from: a cell of a grid over the view."""

    rows: int
    columns: int
    cells: tuple[int, ...]  # of each token, counted row by row; -1: of no place


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """The numbers of one connector; subclasses add fields and, if they merge, `token_grid`."""

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens made from one view's (height, width) features.

        Raises:
            UserError: the connector cannot take such a grid.
        """
        return height, width

    def token_cells(self, height: int, width: int) -> TokenCells | None:
        """Return where in a view of (height, width) features its tokens look; None: anywhere.

        Tokens in one row, (1, Q), are queries that read all features: the base takes them so.
        """
        rows, columns = self.token_grid(height, width)
        if rows == 1 < min(height, columns):
            return None
        return TokenCells(rows, columns, tuple(range(rows * columns)))

    def text_source(self) -> TextSource | None:
        """Return how the text is made that the connector reads; None: it reads none."""
        return None


C = TypeVar("C", bound=ConnectorConfig)


class Connector(nn.Module, Generic[C]):
    """Base of all connectors.

    Subclasses set `config_class`, build their layers in `__init__` and implement their faces: most
    only `project`. The attribute `config` is the instance of `config_class` it was built from.

    Attributes:
        faces: which faces the class fills.
        side_kind: how `side` hands tensors to the language model's layers: not at all; one row per
            token that `project` made ("tokens"); or as what all positions may attend to ("media").
        takes_tokens: the tokens projected so far do not stand in the sequence: `side` gets them,
            and `replace_tokens` gives what stands there.
    """

    config_class: ClassVar[type[ConnectorConfig]] = ConnectorConfig
    faces: ClassVar[frozenset[Face]] = frozenset({"project"})
    side_kind: ClassVar[Literal["none", "tokens", "media"]] = "none"
    takes_tokens: ClassVar[bool] = False

    def __init__(self, config: C, vision_dims: Sequence[int], text_dim: int) -> None:
        """Remember the sizes.

        Args:
            config: the connector's own numbers.
            vision_dims: D of each feature map the encoder gives.
            text_dim: E, the width of the language model's embeddings.
        """
        super().__init__()
        self.config = config
        self.vision_dims = tuple(vision_dims)
        self.text_dim = text_dim

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens made from one view's (height, width) features."""
        return self.config.token_grid(height, width)

    def view_token_grid(self, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of one view whose feature maps have these grids."""
        return self.token_grid(*grids[0])

    def view_token_cells(self, grids: Sequence[tuple[int, int]]) -> TokenCells | None:
        """Return where the tokens look of a view whose feature maps have these grids."""
        return self.config.token_cells(*grids[0])

    def num_tokens(self, height: int, width: int) -> int:
        """Return N, the exact number of tokens `project` makes from one (height, width) view."""
        rows, columns = self.token_grid(height, width)
        return rows * columns

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps (T, H, W, D_i) to tokens (T, N, E), row-major over `token_grid`."""
        raise NotImplementedError

    @property
    def reads(self) -> frozenset[Reading]:
        """Return what of `Views` the connector wants to know."""
        return frozenset()

    def forward(self, features: Sequence[Tensor], views: Views = NOTHING_KNOWN) -> Tensor:
        """Same as `project`, with what the connector `reads` of the views."""
        return self.project(features)

    @classmethod
    def build(
        cls, config: C, vision_dims: Sequence[int], text_dim: int, host: HostShape | None
    ) -> Self:
        """Build the connector; those inside the language model override this to look at `host`."""
        return cls(config, vision_dims, text_dim)

    @classmethod
    def media_dim(cls, config: C, vision_dims: Sequence[int]) -> int:
        """Return the width of the tokens that a connector which takes tokens wants."""
        raise NotImplementedError

    def side(self, features: Sequence[Tensor], tokens: Tensor | None) -> Sequence[Tensor]:
        """Return what the layers will read of each view.

        Args:
            features: maps (T, H, W, D_i).
            tokens: (T, N, E) as projected so far.

        Returns:
            For "tokens", tensors (T, N, C) with one row per token, or (T, N, R * R, V) with an
            R x R window of a map of R times the token grid per token; where tokens are pooled, a
            video's, so are rows and maps. For "media", one tensor (T, M, width).
        """
        raise NotImplementedError

    def project_and_side(
        self, features: Sequence[Tensor], views: Views
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return `project` and `side` of one computation, for connectors that fill both faces."""
        tokens = self(features, views)
        return tokens, self.side(features, tokens)

    def replace_tokens(self, tokens: Tensor) -> Tensor:
        """Return what stands in the sequence instead of tokens (T, N, width): (T, N', E)."""
        raise NotImplementedError

    def layer_sites(self) -> Sequence[LayerSite]:
        """Return where hidden states pass through `layer_apply`."""
        return ()

    def layer_apply(
        self,
        site: LayerSite,
        hidden: Tensor,
        context: FusionContext,
        side: Sequence[Tensor] | Media | None,
    ) -> Tensor:
        """Return the hidden states (B, L, E) that go on from a site.

        Args:
            site: one of `layer_sites`.
            hidden: (B, L, E).
            context: of this call.
            side: what `side` gave, arranged: (K, ...) each, or `Media`; None: no image so far.
        """
        raise NotImplementedError

    def linear_sites(self) -> Sequence[LinearSite]:
        """Return the linear layers that `linear_apply` serves."""
        return ()

    def linear_rows(self, context: FusionContext) -> Tensor:
        """Return the places of the tokens that `linear_apply` serves, (K,) in the batch (B * L)."""
        return context.rows

    @property
    def shares_positions(self) -> bool:
        """Return whether the inner tokens of an image share one position (`saved_positions`)."""
        return False

    # Whether `linear_apply` is added to what the linear layer makes of these tokens, or stands for
    # it, so that the linear layer sees the others only.
    replaces_linear: ClassVar[bool] = False

    def linear_apply(self, site: LinearSite, x: Tensor) -> Tensor:
        """Map the inputs of chosen tokens (K, in) to (K, out)."""
        raise NotImplementedError

    def begin_from(self, linear_at: Callable[[LinearSite], nn.Module]) -> None:
        """Let new weights begin as those of the language model's linear layers, where published."""

    @property
    def row_end_dim(self) -> int:
        """Return C, the width of row ends that are learned before the last projection, or E."""
        return self.text_dim

    def project_row_ends(self, learned: Tensor) -> Tensor:
        """Map row ends (K, C), learned before the last projection, to tokens (K, E)."""
        return learned

    def itself(self) -> Self:
        """Return the connector also where it is asked of a wrapper (PEFT's modules_to_save)."""
        return self

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return `key_tables`; connectors inside the language model look at its layers first."""
        return type(self).key_tables(self.config)

    @classmethod
    def key_tables(cls, config: C) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return, per published format, its checkpoint keys and our own: {format: {theirs: ours}}.

        Ours is a name, or a layout (connectors/key_table.py) where the tensors differ in shape.

        Empty where no such checkpoint is known. `connectors.checkpoint_keys` translates with them.
        """
        return {}


class InsideConnector(Connector[C]):
    """Base of those whose size the language model decides: `__init__` gets its numbers too."""

    def __init__(
        self, config: C, vision_dims: Sequence[int], text_dim: int, host: HostShape
    ) -> None:
        """Remember the sizes; `host` are the language model's numbers."""
        super().__init__(config, vision_dims, text_dim)
        self.host = host

    @classmethod
    def build(
        cls, config: C, vision_dims: Sequence[int], text_dim: int, host: HostShape | None
    ) -> Self:
        """Build for the language model `host`, which connectors/chain.py has asked for."""
        assert host is not None
        return cls(config, vision_dims, text_dim, host)


def merged_grid(name: str, factor: int, height: int, width: int) -> tuple[int, int]:
    """Return (H / R, W / R), the grid where R x R features become one token.

    Args:
        name: of the connector, for the error.
        factor: R.
        height, width: H and W.

    Raises:
        UserError: R does not divide the feature grid.
    """
    rows, row_rest = divmod(height, factor)
    columns, column_rest = divmod(width, factor)
    if row_rest or column_rest:
        raise UserError(
            f"connector {name!r}: factor {factor} does not divide the vision encoder's feature "
            f"grid {height} x {width}; choose another factor, or an image_size whose grid is a "
            f"multiple of {factor}"
        )
    return rows, columns


def join_channels(features: Sequence[Tensor], vision_dims: Sequence[int]) -> Tensor:
    """Return several feature maps of one grid as one map (T, H, W, sum of D_i).

    Raises:
        UserError: the maps have different grids.
    """
    assert [f.shape[-1] for f in features] == list(vision_dims), (
        f"features have widths {[f.shape[-1] for f in features]}, built for {list(vision_dims)}"
    )
    grids = [tuple(f.shape[1:3]) for f in features]
    if len(set(grids)) > 1:
        raise UserError(
            f"this connector joins feature maps of one grid, but the vision encoder gives {grids}; "
            "choose layers of the same size in vision_encoder.layer"
        )
    return features[0] if len(features) == 1 else torch.cat(list(features), dim=-1)
