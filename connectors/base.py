"""What must every connector do? Turn encoder features into tokens, and say exactly how many.

Shapes: T views, H W feature grid, D encoder width, N tokens per view, E language-model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from connectors.errors import UserError
from connectors.key_table import Layout


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """The numbers of one connector; subclasses add fields and, if they merge, `token_grid`."""

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens made from one view's (height, width) features.

        Raises:
            UserError: the connector cannot take such a grid.
        """
        return height, width


C = TypeVar("C", bound=ConnectorConfig)


class Connector(nn.Module, Generic[C]):
    """Base of all connectors that project features to tokens before the language model.

    Subclasses set `config_class`, build their layers in `__init__` and implement `project`. The
    attribute `config` is the instance of `config_class` it was built from.
    """

    config_class: ClassVar[type[ConnectorConfig]] = ConnectorConfig

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

    def num_tokens(self, height: int, width: int) -> int:
        """Return N, the exact number of tokens `project` makes from one (height, width) view."""
        rows, columns = self.token_grid(height, width)
        return rows * columns

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Map feature maps (T, H, W, D_i) to tokens (T, N, E), row-major over `token_grid`."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Same as `project`: (T, H, W, D_i) each -> (T, N, E)."""
        return self.project(features)

    @classmethod
    def key_tables(cls, config: C) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return, per published format, its checkpoint keys and our own: {format: {theirs: ours}}.

        Ours is a name, or a layout (connectors/key_table.py) where the tensors differ in shape.

        Empty where no such checkpoint is known. `connectors.checkpoint_keys` translates with them.
        """
        return {}


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
