"""How much does each word of an answer attend to each token of its images?

A word's row is that of the position which said it: its tokens' predecessors, as in generation.

Shapes: A tokens of the answer, H heads, M layers, L sequence, I tokens of all images, K of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from connectors.base import TokenCells
from vlm.errors import UserError
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import IGNORE, VlmProcessor
from vlm.seeing.passes import LastPositions, eager_attention, last_positions
from vlm.seeing.token_places import TokenPlaces, token_places
from vlm.seeing.words import Word, words_of
from vlm.tiling import plan_of
from vlm.video import SampledVideo

RECORDED_ELEMENTS = 2**26  # weights of all layers held at once in one piece: 256 MB in float32
KEPT_ELEMENTS = 2**25  # kept of an answer: 64 MB in half precision; above it heads are averaged
Views = Literal["all", "whole", "tiles"]


@dataclass(frozen=True)
class AnswerAttention:
    """What the words of an answer attend to.

    Attributes:
        words: of the answer.
        weights: (M, H, A, I) half precision, of each of the answer's tokens on the images' tokens;
            H is 1 where the heads were averaged to save memory.
        places: where the tokens of each image or video look, in the placeholders' order.
        sizes: (width, height) of each.
    """

    words: tuple[Word, ...]
    weights: Tensor
    places: tuple[TokenPlaces, ...]
    sizes: tuple[tuple[int, int], ...]

    def on_image(
        self,
        image: int,
        words: Sequence[int],
        layer: int | None = None,
        head: int | None = None,
        views: Views = "all",
    ) -> Tensor:
        """Return (K,) the share of attention that rests on each token of an image or video.

        Args:
            image: its number.
            words: numbers of the words; their tokens are averaged. Empty: the whole answer.
            layer: its number; None: the mean of all.
            head: its number; None: the mean of all.
            views: of which views; the weight of the others becomes 0.
        """
        chosen = [self.words[number] for number in words] or list(self.words)
        tokens = [token for word in chosen for token in range(word.start, word.stop)]
        counts = [len(places.boxes) for places in self.places]
        start = sum(counts[:image])
        weights = self.weights[:, :, tokens, start : start + counts[image]]
        weights = weights if layer is None else weights[layer : layer + 1]
        weights = weights if head is None else weights[:, head : head + 1]
        share = weights.double().mean((0, 1, 2))
        whole = self.places[image].whole
        if views == "all" or not whole.any():
            return share
        return share * (whole if views == "whole" else ~whole)


@torch.inference_mode()
def answer_attention(
    model: VlmForConditionalGeneration,
    processor: VlmProcessor,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Image.Image],
    videos: Sequence[SampledVideo] = (),
) -> AnswerAttention:
    """Return what the last answer of a conversation attends to.

    Args:
        model: in eval mode; nobody else may run it meanwhile.
        processor: its processor.
        messages: up to and with the answer, see `vlm.conversations`.
        images: decoded, in order.
        videos: sampled, in order.

    Raises:
        UserError: there is no image or no answer; the connector keeps no places, the language
            model has no attention, or its weights would take too much memory at once.
    """
    cells = _cells(model, len(images) + len(videos))
    encoded = processor.encode(messages, images, videos=videos, supervise=True)
    start, stop = _last_answer(encoded["labels"])
    words = words_of(processor.tokenizer, encoded["input_ids"][start:stop].tolist())
    if not words:
        raise UserError("the answer is empty, so there is nothing to look at")
    stop = start + words[-1].stop  # without the end of the turn
    is_image = encoded["input_ids"] == processor.image_token_id
    inputs = processor.collate([encoded], padding_side="left")
    run = last_positions(model, inputs, start - 1)
    with eager_attention(model.model.language_model):
        rows = _rows(run, start - 1, stop - 1, is_image.nonzero()[:, 0])
    sizes = [(width, height) for height, width in encoded["image_sizes"].tolist()]
    parts = model.model
    plans = [plan_of(parts.tiling, (r, c)) for r, c in encoded["tile_grids"].tolist()]
    places = [
        token_places(
            *(size, parts.tiling, parts.vision_tower.image_size),
            *(parts.view_token_grid(), cells, plan, parts.video),
        )
        for size, plan in zip(sizes, plans, strict=True)
    ]
    return AnswerAttention(words, rows, tuple(places), tuple(sizes))


def why_no_map(model: VlmForConditionalGeneration) -> Literal["recurrent", "no_places"] | None:
    """Return why attention cannot be drawn over this model's images; None: it can."""
    parts = model.model
    if parts.state_traits is not None and not parts.state_traits.has_keys:
        return "recurrent"
    cells = parts.connector.itself().view_token_cells(parts.vision_tower.grids)
    return "no_places" if cells is None else None


def _cells(model: VlmForConditionalGeneration, num_images: int) -> TokenCells:
    """Return where in a view the connector's tokens look.

    Raises:
        UserError: why attention cannot be drawn over the images of this model or conversation.
    """
    parts = model.model
    if not num_images:
        raise UserError("the conversation has no picture, so there is nothing to draw on")
    reason = why_no_map(model)
    if reason == "recurrent":
        raise UserError(
            f"the language model ({model.config.text_config.model_type}) is recurrent: it has no "
            "attention that could be drawn"
        )
    cells = parts.connector.itself().view_token_cells(parts.vision_tower.grids)
    if cells is None:
        raise UserError(
            "the connector's tokens keep no places: each of them may read the whole picture, so "
            "attention to them cannot be drawn on it"
        )
    return cells


def _last_answer(labels: Tensor) -> tuple[int, int]:
    """Return [start, stop) of the last run of supervised positions."""
    learnt = labels != IGNORE
    if not bool(learnt.any()):
        raise UserError("the answer is empty, so there is nothing to look at")
    stop = int(learnt.nonzero()[-1]) + 1
    before = (~learnt[:stop]).nonzero()
    return (int(before[-1]) + 1 if len(before) else 0), stop


def _rows(run: LastPositions, first: int, stop: int, columns: Tensor) -> Tensor:
    """Return the weights (M, H, stop - first, I) of positions first..stop on some columns (I,)."""
    text = run.model.config.text_config
    per_row = text.num_hidden_layers * text.num_attention_heads * stop
    if run.past is None and per_row * stop > RECORDED_ELEMENTS:
        raise UserError(
            f"the conversation has {stop} tokens, and this language model takes them only all at "
            f"once: its attention weights would take {per_row * stop * 4 / 1e9:.1f} GB; ask about "
            "fewer or smaller pictures"
        )
    step = stop if run.past is None else max(1, RECORDED_ELEMENTS // per_row)
    average = text.num_hidden_layers * text.num_attention_heads * (stop - first) * len(columns)
    pieces, begin = [], run.start
    while begin < stop:
        end = min(begin + step, stop)
        weights = run.run(end, begin, output_attentions=True).attentions or ()
        layers = [_on_columns(w, max(first - begin, 0), columns, end) for w in weights]
        if not layers:
            raise UserError(f"{type(run.model.model.language_model).__name__} shows no attention")
        if average > KEPT_ELEMENTS:
            layers = [layer.mean(0, keepdim=True) for layer in layers]
        pieces.append(torch.stack([layer.half() for layer in layers]))
        begin = end
    return torch.cat(pieces, dim=2)


def _on_columns(weights: Tensor, first: int, columns: Tensor, length: int) -> Tensor:
    """Return the rows from `first` on, of weights (1, H, Q, keys), at columns of the sequence.

    A sliding window keeps the last keys alone; columns before them have no weight.
    """
    gone = length - weights.shape[-1]
    rows = weights[0, :, first:].float().cpu()
    picked = rows[..., (columns - gone).clamp(min=0)]
    return picked * (columns >= gone)
