"""How do features of several encoder layers reach several decoder layers? DeepStack (Qwen3-VL).

Shapes: T views, H W feature grid, D encoder width, R merge factor, N tokens per view, K image
tokens of the batch, B batch, L sequence, E language-model width.

Each feature map has an MLP of its own; what map k gives is added to the hidden states of the image
tokens after decoder layer k. Another connector makes the tokens themselves, one for each merged
feature: `[{type: pixel_shuffle, features: [3]}, {type: deepstack, factor: 2, features: [0, 1, 2]}]`
with `vision_encoder: {layer: [-19, -11, -3, -1]}`.

Follows `Qwen3VLVisionPatchMerger` (norm after the merge) and `_deepstack_process` of
transformers' modeling_qwen3_vl.py; arXiv:2406.04334 has the idea.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from connectors.base import ConnectorConfig, InsideConnector, merged_grid
from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, Media
from connectors.key_table import KeyTable, Layout
from connectors.pixel_shuffle import pixel_shuffle


@dataclass(frozen=True, kw_only=True)
class DeepStackConfig(ConnectorConfig):
    """How features merge, and where they go."""

    factor: int = 1  # R; Qwen3-VL: 2
    first_layer: int = 0  # the decoder layer after which the first map is added

    def __post_init__(self) -> None:
        check_positive("connector 'deepstack'", factor=self.factor)
        if self.first_layer < 0:
            raise UserError(
                f"connector 'deepstack': first_layer counts from 0, not {self.first_layer}"
            )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (H / R, W / R).

        Raises:
            UserError: R does not divide the feature grid.
        """
        return merged_grid("deepstack", self.factor, height, width)


class Merger(nn.Module):
    """R x R features side by side, a norm, and an MLP to E."""

    def __init__(self, dim: int, factor: int, text_dim: int) -> None:
        super().__init__()
        self.factor = factor
        merged = dim * factor**2
        self.norm = nn.LayerNorm(merged, eps=1e-6)
        self.linear_1 = nn.Linear(merged, merged)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(merged, text_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map a feature map (T, H, W, D) to (T, N, E)."""
        merged = pixel_shuffle(features, self.factor).flatten(1, 2)
        return self.linear_2(self.act(self.linear_1(self.norm(merged))))


class DeepStackConnector(InsideConnector[DeepStackConfig]):
    """A merger for each feature map; decoder layers add what they give."""

    config_class = DeepStackConfig
    faces = frozenset({"in_layer"})
    side_kind = "tokens"

    def __init__(
        self,
        config: DeepStackConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape,
    ) -> None:
        """Build the mergers.

        Raises:
            UserError: the language model has too few layers.
        """
        super().__init__(config, vision_dims, text_dim, host)
        last = config.first_layer + len(vision_dims)
        if last > host.num_layers:
            raise UserError(
                f"connector 'deepstack' adds {len(vision_dims)} feature maps after the decoder "
                f"layers from {config.first_layer} on, but the language model has "
                f"{host.num_layers}; name fewer in features"
            )
        self.mergers = nn.ModuleList(Merger(d, config.factor, text_dim) for d in vision_dims)

    def side(self, features: Sequence[Tensor], tokens: Tensor | None) -> Sequence[Tensor]:
        """Return what each feature map (T, H, W, D_i) gives, (T, N, E)."""
        return [merge(f) for merge, f in zip(self.mergers, features, strict=True)]

    def layer_sites(self) -> Sequence[LayerSite]:
        """Return the ends of as many decoder layers as there are maps."""
        first = self.config.first_layer
        return [LayerSite(first + i, "after") for i in range(len(self.mergers))]

    def layer_apply(
        self,
        site: LayerSite,
        hidden: Tensor,
        context: FusionContext,
        side: Sequence[Tensor] | Media | None,
    ) -> Tensor:
        """Add the map's rows (K, E) to the image tokens of hidden states (B, L, E)."""
        if side is None:
            return hidden
        assert not isinstance(side, Media)
        rows = side[site.layer - self.config.first_layer].to(hidden)
        flat = hidden.flatten(0, 1).index_add(0, context.rows.to(hidden.device), rows)
        return flat.unflatten(0, hidden.shape[:2])

    @classmethod
    def key_tables(cls, config: DeepStackConfig) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of Qwen3-VL's `deepstack_merger_list`, which has three."""
        ported = {"norm": "norm", "linear_fc1": "linear_1", "linear_fc2": "linear_2"}
        keys = {
            f"deepstack_merger_list.{i}.{theirs}.{n}": f"mergers.{i}.{ours}.{n}"
            for i in range(3)
            for theirs, ours in ported.items()
            for n in ("weight", "bias")
        }
        return {"qwen3_vl": KeyTable(keys, roots=("deepstack_merger_list",))}
