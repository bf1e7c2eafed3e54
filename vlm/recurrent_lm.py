"""How is a language model run whose layers carry a state: Mamba, xLSTM, hybrids with attention?

Shapes: B batch, L sequence, E language-model width, P packed documents, M the longest of them.

A mask keeps attention from looking at a position; a state has already been through it. Hence:

- Padding to the left becomes embeddings of zero, and the mask goes to models that take one: some
  mask the input of every layer (Mamba), in others a zero stays zero through all layers (xLSTM).
  Whether that is exact is tried on three tokens, because it depends on the layers and their biases.
- Packed documents are run as rows of their own: exact in any model, but packing saves nothing.
- Models without attention call their cache `cache_params`, and it does not know its length, for
  which generation asks; `vlm.state_cache.StateCache` does.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm.errors import UserError
from vlm.lm_head import document_starts
from vlm.packed_rows import document_places, put_back, take_apart
from vlm.state_cache import StateCache, StateTraits, new_cache


@torch.no_grad()
def check_state_cache(language_model: PreTrainedModel, traits: StateTraits) -> None:
    """Check on three tokens that the model's state comes back in the cache.

    Raises:
        UserError: it does not: the model keeps it in its modules, or wants another kind of cache.
    """
    name = type(language_model).__name__
    cache = new_cache(language_model, traits)
    with _evaluating(language_model):
        try:
            embeds = _three_embeddings(language_model)
            output = run(language_model, traits, embeds, past_key_values=cache, use_cache=True)
        except ValueError as error:
            raise UserError(f"{name} cannot be the language model: {error}") from error
    if output.past_key_values is None:
        raise UserError(
            f"{name} cannot be the language model: it keeps its state in its layers and not in a "
            "cache, so that conversations would share it; choose another one"
        )


def run(
    language_model: PreTrainedModel,
    traits: StateTraits,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run a language model with a state on embeddings.

    Args:
        language_model: without its head.
        traits: of `state_traits`.
        inputs_embeds: (B, L, E).
        attention_mask: (B, positions seen before and L) 0 on padding.
        position_ids: (B, L); restarts inside a row separate packed documents.
        past_key_values: of `new_cache`; brought up to date.
        **kwargs: to the language model.

    Raises:
        UserError: padding would reach the state.
    """
    packed = document_starts(position_ids, attention_mask) is not None
    if packed and position_ids is not None and past_key_values is None:
        return _run_documents(
            language_model, traits, inputs_embeds, attention_mask, position_ids, **kwargs
        )
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2 and length > 1:
        keeps_state = past_key_values is not None
        if _is_left_padded(language_model, attention_mask, keeps_state):
            _check_left_padding(language_model, traits)
        padding = attention_mask[:, -length:, None] == 0
        inputs_embeds = inputs_embeds.masked_fill(padding, 0.0)
    return _call(
        language_model,
        traits,
        inputs_embeds,
        attention_mask,
        position_ids,
        past_key_values,
        **kwargs,
    )


def _call(
    language_model: PreTrainedModel,
    traits: StateTraits,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Call the model with the names it knows; the arguments are those of `run`."""
    if cache is None and language_model.training:
        kwargs["use_cache"] = False  # a state that is written in place has no gradient
    elif cache is None and kwargs.setdefault("use_cache", language_model.config.use_cache):
        cache = new_cache(language_model, traits)
    if traits.takes_mask:
        if traits.cache_name == "cache_params" and attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]
        kwargs["attention_mask"] = attention_mask
    if traits.takes_positions:
        kwargs["position_ids"] = position_ids
    given = cache.own if isinstance(cache, StateCache) and traits.own_cache else cache
    kwargs[traits.cache_name] = given
    with _mixed_types(traits, inputs_embeds):
        output = language_model(inputs_embeds=inputs_embeds, **kwargs)
    returned = output.get(traits.cache_name)
    if isinstance(cache, StateCache) and returned is not None:
        cache.length += inputs_embeds.shape[1]
        if traits.own_cache:
            cache.own = returned
        returned = cache
    return BaseModelOutputWithPast(
        # Mamba's is float32 where its residual is kept so.
        last_hidden_state=output.last_hidden_state.to(inputs_embeds.dtype),
        past_key_values=returned,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )


def _mixed_types(traits: StateTraits, inputs_embeds: Tensor) -> AbstractContextManager[object]:
    """Let xLSTM multiply its float32 states with half-precision keys."""
    if traits.own_cache and inputs_embeds.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(inputs_embeds.device.type, inputs_embeds.dtype)
    return nullcontext()


def _run_documents(
    language_model: PreTrainedModel,
    traits: StateTraits,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run each packed document as a row of its own; the arguments are those of `run`."""
    size = inputs_embeds.shape[:2]
    places = document_places(position_ids, attention_mask)  # (P, M)
    output = _call(
        language_model,
        traits,
        take_apart(inputs_embeds, places),
        (places >= 0).long(),
        take_apart(position_ids, places),
        None,
        **{**kwargs, "use_cache": False},
    )
    hidden_states = output.hidden_states
    if hidden_states is not None:
        hidden_states = tuple(put_back(states, places, *size) for states in hidden_states)
    assert output.last_hidden_state is not None
    return BaseModelOutputWithPast(
        last_hidden_state=put_back(output.last_hidden_state, places, *size),
        hidden_states=hidden_states,
    )


def _is_left_padded(language_model: PreTrainedModel, mask: Tensor, keeps_state: bool) -> bool:
    """Return whether a mask (B, L) begins with padding in some row.

    Raises:
        UserError: padding follows a token and the state goes on from there.
    """
    real = mask.bool()
    begins = real[:, 1:] & ~real[:, :-1]
    ends = real[:, :-1] & ~real[:, 1:]
    if bool((ends.cumsum(1).bool() & begins).any()) or (keeps_state and bool(ends.any())):
        raise UserError(
            f"{type(language_model).__name__} carries a state through the padding that follows a "
            "token; pad the rows on the left before generating"
        )
    return bool(begins.any())


@torch.no_grad()
def _check_left_padding(language_model: PreTrainedModel, traits: StateTraits) -> None:
    """Compare three tokens behind two of padding with the same three alone.

    Raises:
        UserError: they differ.
    """
    embeds = _three_embeddings(language_model)
    padded = torch.cat([torch.zeros_like(embeds[:, :2]), embeds], dim=1)
    mask = torch.ones(1, 5, dtype=torch.long, device=embeds.device)
    mask[:, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with _evaluating(language_model):
        alone, behind = (
            _call(language_model, traits, x, m, p, None, use_cache=False).last_hidden_state
            for x, m, p in ((embeds, None, positions[:, 2:]), (padded, mask, positions))
        )
    assert alone is not None and behind is not None
    difference = (alone - behind[:, 2:]).abs().max().item()
    size = alone.abs().max().item()
    if not difference <= torch.finfo(alone.dtype).eps ** 0.5 * size:
        raise UserError(
            f"{type(language_model).__name__} lets padding on the left into its state (its outputs "
            f"of size {size:.2g} change by {difference:.2g}); give it one row at a time, or rows "
            "of one length"
        )


def _three_embeddings(language_model: PreTrainedModel) -> Tensor:
    """Return the embeddings of the first three ids, (1, 3, E)."""
    ids = torch.arange(3, device=language_model.device)[None]
    return language_model.get_input_embeddings()(ids)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
