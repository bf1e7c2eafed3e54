"""How is a conversation run again so that only its last positions are looked at?

What comes before them goes through the language model as it always does and leaves its cache; the
last positions follow in pieces, so that what is recorded of them stays small. Language models with
a state take the whole conversation in one piece.

Shapes: L sequence, E language-model width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm.modeling import VlmForConditionalGeneration


@dataclass(frozen=True)
class LastPositions:
    """A conversation of which the positions from `start` on are still to be run.

    Attributes:
        model: the model.
        inputs: of the whole conversation, a batch of one on the model's device.
        start: the first position that is to be looked at or, where the model cannot begin there, 0.
        past: cache of the positions before.
    """

    model: VlmForConditionalGeneration
    inputs: Mapping[str, Tensor]
    start: int
    past: Any

    def run(self, stop: int, begin: int | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """Run positions [begin, stop) without the head; `kwargs` go to the language model.

        Called several times, `begin` is where the call before stopped; None: `start`.
        """
        begin = self.start if begin is None else begin
        parts = _piece(self.inputs, begin, stop, with_images=begin == 0)
        has_cache = self.past is not None
        return self.model.model(**parts, past_key_values=self.past, use_cache=has_cache, **kwargs)


def last_positions(
    model: VlmForConditionalGeneration, inputs: Mapping[str, Tensor], start: int
) -> LastPositions:
    """Run a conversation up to a position, or nothing of it where it can only be run as a whole.

    Args:
        model: in eval mode.
        inputs: what the processor's `collate` gives for one conversation.
        start: the first position that is to be looked at.
    """
    inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "labels"}
    assert len(inputs["input_ids"]) == 1, "one conversation"
    # Images are found by their tokens, all in one call.
    is_image = inputs["input_ids"][0, start:] == model.config.image_token_id
    if start == 0 or model.model.state_traits is not None or bool(is_image.any()):
        return LastPositions(model, inputs, 0, None)
    parts = _piece(inputs, 0, start, with_images=True)
    past = model.model(**parts, use_cache=True).past_key_values
    return LastPositions(model, inputs, start, past)


def _piece(
    inputs: Mapping[str, Tensor], begin: int, stop: int, with_images: bool
) -> dict[str, Tensor]:
    """Return the model's inputs for positions [begin, stop)."""
    ids = inputs["input_ids"]
    rest = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
    return {
        "input_ids": ids[:, begin:stop],
        "attention_mask": inputs["attention_mask"][:, :stop],
        "position_ids": torch.arange(begin, stop, device=ids.device)[None],
        **(rest if with_images else {}),
    }


@contextmanager
def eager_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model give its attention weights while the block runs.

    Nobody else may run the model meanwhile: what it attends with is a setting of its config.
    """
    config = language_model.config
    former = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = former
