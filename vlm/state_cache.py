"""Which state does a language model carry from position to position, and what cache holds it?"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)

from vlm.errors import UserError


@dataclass(frozen=True)
class StateTraits:
    """How a language model with a state is called.

    Attributes:
        cache_name: what its forward calls the cache: "past_key_values", or "cache_params" where
            there is no attention.
        takes_mask: whether its forward takes an attention mask.
        takes_positions: whether its forward takes position ids.
        has_keys: whether the cache holds keys of attention, by which it knows its length.
        own_cache: whether the model makes a cache of its own kind.
    """

    cache_name: str
    takes_mask: bool
    takes_positions: bool
    has_keys: bool
    own_cache: bool


def state_traits(language_model: PreTrainedModel) -> StateTraits | None:
    """Return how to call a language model with a state; None: it has attention alone.

    Either sign of a state is enough: the class says that it cannot go back to an earlier position
    (`_is_stateful`), or the cache that transformers makes for the config has layers that hold one
    (the last inputs of a short convolution count).

    Raises:
        UserError: the state cannot be handed from one call to the next.
    """
    cls = type(language_model)
    names = inspect.signature(cls.forward).parameters
    cache_name = next((name for name in ("past_key_values", "cache_params") if name in names), None)
    if cls._is_stateful and cache_name is None:
        raise UserError(
            f"{cls.__name__} cannot be the language model: it takes its state neither as "
            "past_key_values nor as cache_params; choose another one"
        )
    if cache_name is None:
        return None
    layers = DynamicCache(config=language_model.config).layers
    holds_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    if not cls._is_stateful and not holds_state:
        return None
    has_attention = cache_name == "past_key_values"
    return StateTraits(
        cache_name=cache_name,
        takes_mask="attention_mask" in names,
        takes_positions="position_ids" in names,
        has_keys=has_attention and any(isinstance(layer, CacheLayerMixin) for layer in layers),
        own_cache=not has_attention and not holds_state,
    )


def new_cache(language_model: PreTrainedModel, traits: StateTraits) -> Cache:
    """Return an empty cache for a language model with a state."""
    kind = DynamicCache if traits.has_keys else StateCache
    return kind(config=language_model.config)


class StateCache(DynamicCache):
    """The cache of a model without attention, which counts the positions it has seen.

    Attributes:
        length: positions seen.
        own: what a model that makes its cache itself returned (transformers' xLSTMCache); None
            before the first pass, and for models that use the layers of this cache.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        """Make an empty cache for a language model's config."""
        super().__init__(config=config)
        self.length = 0
        self.own: Any = None

    @property
    def is_compileable(self) -> bool:
        """Return False: for a cache that is, generation builds attention masks."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions were seen."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length of a mask over everything seen and to come, and its offset."""
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the state of row `beam_idx` (B), for beam search."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        if self.own is not None:
            self.own.rnn_state = tree_map_only(
                Tensor, lambda x: x.index_select(0, beam_idx.to(x.device)), self.own.rnn_state
            )


def goes_on(cache: Cache | None) -> bool:
    """Return whether a call goes on after one before, whose images are in its cache."""
    return cache is not None and cache.get_seq_length() > 0
