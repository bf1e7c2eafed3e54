"""How do image tokens look at the encoders again inside the language model? Cambrian's whole SVA.

Shapes: T views, N tokens per view, K image tokens of the batch, B batch, L sequence, E language-
model width, V sampler width, R_i side of map i's window.

The connector `sva`, and samplers of one layer after some decoder layers: there the queries are the
hidden states of image tokens, each with the window and the context that it had before the language
model. The ends of rows, which no window made, pass unchanged. What is decoded sees nothing new.

Follows `cambrian/model/language_model/cambrian_llama.py` of cambrian-mllm/cambrian; section 3.2 of
arXiv:2406.16860.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from connectors.config import check_positive
from connectors.errors import UserError
from connectors.fusion import FusionContext, HostShape, LayerSite, Media
from connectors.key_table import Layout
from connectors.sva import SVAConfig, SVAConnector
from connectors.sva_blocks import Sampler
from connectors.sva_keys import sampler_keys
from connectors.views import Views


@dataclass(frozen=True, kw_only=True)
class SVAInLLMConfig(SVAConfig):
    """After which decoder layers samplers stand; published: 10, 0 and 3 for 8B, 10/0/4 for 13B."""

    num_samplers: int = 10
    first_layer: int = 0
    layer_stride: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            "connector 'sva_in_llm'",
            num_samplers=self.num_samplers,
            layer_stride=self.layer_stride,
            first_layer=self.first_layer + 1,
        )


class SVAInLLMConnector(SVAConnector):
    """`SVAConnector`, and samplers inside the language model."""

    config_class = SVAInLLMConfig
    faces = frozenset({"project", "in_layer"})
    side_kind = "tokens"

    def __init__(self, config: SVAInLLMConfig, vision_dims: Sequence[int], text_dim: int) -> None:
        super().__init__(config, vision_dims, text_dim)
        self.inner_samplers = nn.ModuleList(
            Sampler(text_dim, config.hidden_dim, self.windows, 1, config.num_heads, config.kind)
            for _ in range(config.num_samplers)
        )
        self._numbers = [
            config.first_layer + n * config.layer_stride for n in range(config.num_samplers)
        ]

    @classmethod
    def build(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        config: SVAInLLMConfig,
        vision_dims: Sequence[int],
        text_dim: int,
        host: HostShape | None,
    ) -> Self:
        """Build for the language model `host`.

        Raises:
            UserError: it has too few layers.
        """
        assert host is not None
        made = cls(config, vision_dims, text_dim)
        if made._numbers[-1] >= host.num_layers:
            raise UserError(
                f"connector 'sva_in_llm' has samplers after the decoder layers {made._numbers}, "
                f"counted from 0, but the language model has {host.num_layers}; set num_samplers, "
                "first_layer or layer_stride"
            )
        return made

    def project_and_side(
        self, features: Sequence[Tensor], views: Views
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return tokens (T, N, E), and what each of them sees: a flag, its context, its windows.

        Where views are padded, the windows' masks follow.
        """
        maps = self.project_maps(features)
        tokens = self.project_from(maps, views.shown)
        seen = self.look(maps, views.shown)
        flag = tokens.new_ones(*tokens.shape[:2], 1)
        masks = [mask[..., None].to(tokens) for mask in seen.masks or ()]
        parts = (seen.context, *seen.windows, *masks)
        return tokens, [flag, *(x.unflatten(0, tokens.shape[:2]) for x in parts)]

    def layer_sites(self) -> Sequence[LayerSite]:
        """Return the decoder layers with a sampler after them."""
        return [LayerSite(layer, "after") for layer in self._numbers]

    def layer_apply(
        self,
        site: LayerSite,
        hidden: Tensor,
        context: FusionContext,
        side: Sequence[Tensor] | Media | None,
    ) -> Tensor:
        """Let the image tokens of hidden states (B, L, E) look into their windows."""
        sampler = self.inner_samplers[self._numbers.index(site.layer)]
        rows = context.rows.to(hidden.device)
        if side is None:
            if not context.run_all:
                return hidden
            v = self.config.hidden_dim
            side = [hidden.new_zeros(0, n, v) for n in (1, *(s**2 for s in self.windows))]
            side = [hidden.new_zeros(0, 1), *side]
        assert not isinstance(side, Media)
        count = len(self.windows)
        made, seen, *windows = (x.to(hidden) for x in side[: 2 + count])
        # The end of a row sees nothing, which is no window a softmax could go over.
        masks = [(x.to(hidden.device)[..., 0] > 0) | (made == 0) for x in side[2 + count :]] or None
        flat = hidden.flatten(0, 1)
        queries = flat.index_select(0, rows)
        found = sampler(queries[:, None], seen, windows, masks)[:, 0]
        changed = torch.where(made > 0, found, queries)
        return flat.index_copy(0, rows, changed).unflatten(0, hidden.shape[:2])

    def published_keys(self) -> Mapping[str, Mapping[str, str | Layout]]:
        """Return the keys of Cambrian's checkpoints."""
        tables = {name: dict(table) for name, table in self.key_tables(self.config).items()}
        for table in tables.values():
            for n in range(len(self.inner_samplers)):
                theirs, ours = f"vision_sampler_layers.{n}.", f"inner_samplers.{n}."
                table |= sampler_keys(theirs, ours, list(self.windows), 1, self.config.kind)
        return tables
