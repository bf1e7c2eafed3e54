"""Which three losses train a Q-Former on pictures and captions? Contrast, matching, captioning.

Shapes: B pairs of this process, A pairs of all processes, Q queries, L text tokens, P width of the
shared space, V words. Every loss is given pair by pair, (B,), so that whoever trains can average
over the pairs, or words, of all processes and accumulation steps.

Surprises:
- Every loss but matching has label smoothing 0.1.
- Two pairs of one picture, or of one caption, belong together across: they share the contrast's
  target and are no negatives of each other. LAVIS does so where it is given `image_id` (its COCO
  fine-tuning) and takes them for negatives elsewhere; where all differ, both are the same.
- A negative is drawn by a number in [0, 1) that comes with the pair. What is drawn then depends on
  the pairs alone, not on which process holds them.
- A pair that has no negative (all the others share its picture or caption) draws any, which is
  labelled as what it is: a match.

Follows `lavis/models/blip2_models/blip2_qformer.py` of salesforce/LAVIS.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from connectors.views import TextInput

LABEL_SMOOTHING = 0.1
NEVER = -10000.0  # the score of what must not be drawn; finite, so that a row may hold nothing else


class Pairs(NamedTuple):
    """What is known of B pairs beside picture and text."""

    picture: Tensor  # (B,), integers: equal where two pairs show one picture
    caption: Tensor  # (B,), integers: equal where they have one caption
    draws: Tensor  # (B, 2), float64 in [0, 1): which picture, and which caption, is the negative
    real: Tensor  # (B,), bool; False: stands where there is no pair, and counts for nothing


class Similarities(NamedTuple):
    """Similarity of each pair of this process to each of all, divided by the temperature."""

    image_to_text: Tensor  # (B, A)
    text_to_image: Tensor  # (B, A)


class Stage1Output(NamedTuple):
    """What one step says of each pair, all (B,)."""

    contrastive: Tensor
    matching: Tensor  # the mean of the pair's and its two negatives'
    caption: Tensor  # the sum over the caption's words
    words: Tensor  # how many these are
    found_text: Tensor  # 1 where the picture's nearest caption is its own, else 0
    found_image: Tensor  # 1 where the caption's nearest picture is its own, else 0
    chance: Tensor  # what both would be by chance
    accepted: Tensor  # 1 where the pair was told to be one, else 0
    refused: Tensor  # share of its two negatives that were told not to be one


def similarities(
    image: Tensor, text: Tensor, temperature: Tensor, all_image: Tensor, all_text: Tensor
) -> Similarities:
    """Compare pictures and texts; of a picture's queries the nearest counts.

    Args:
        image: (B, Q, P), of length 1 along P.
        text: (B, P), of length 1.
        temperature: what similarities are divided by.
        all_image: (A, Q, P), those of all processes; in one process `image` itself.
        all_text: (A, P).
    """
    to_text = torch.einsum("bqp,ap->baq", image, all_text).amax(-1)
    to_image = torch.einsum("bp,aqp->baq", text, all_image).amax(-1)
    return Similarities(to_text / temperature, to_image / temperature)


def belong_together(pairs: Pairs, all_picture: Tensor, all_caption: Tensor) -> Tensor:
    """Return (B, A), True where a pair's picture fits another's caption.

    Args:
        pairs: of this process.
        all_picture: (A,), those of all processes.
        all_caption: (A,).
    """
    same_picture = pairs.picture[:, None] == all_picture
    return same_picture | (pairs.caption[:, None] == all_caption)


def contrastive_loss(similarity: Similarities, positives: Tensor) -> Tensor:
    """Return (B,), the mean of both directions' cross-entropy; positives (B, A) share the target.

    With one positive per pair this is cross-entropy with label smoothing.
    """
    share = positives / positives.sum(dim=1, keepdim=True).clamp(min=1)
    targets = (1 - LABEL_SMOOTHING) * share + LABEL_SMOOTHING / positives.shape[1]
    directions = [-(targets * scores.log_softmax(dim=1)).sum(dim=1) for scores in similarity]
    return (directions[0] + directions[1]) / 2


@torch.no_grad()
def draw_negatives(scores: Tensor, positives: Tensor, draws: Tensor) -> Tensor:
    """Draw for each pair one that does not belong to it, the likelier the more similar.

    Args:
        scores: (B, A), as in `Similarities`: `text_to_image` draws pictures, and the reverse.
        positives: (B, A), True where none may be drawn, unless there is nothing else.
        draws: (B,), float64 in [0, 1): how far along the weights, in their order, the choice lies.

    Returns:
        (B,), indices of 0 ... A - 1.
    """
    weights = scores.double().masked_fill(positives, NEVER).softmax(dim=1)
    ends = weights.cumsum(dim=1)
    last = ends[:, -1]
    at = torch.minimum(draws * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(ends, at[:, None], right=True)[:, 0]


def matching_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (B,) of logits (3 B, 2) and targets (3 B,): B pairs, then 2 B drawn beside them."""
    return F.cross_entropy(logits, targets.long(), reduction="none").view(3, -1).mean(dim=0)


def caption_loss(logits: Tensor, text: TextInput) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each next word, summed over the text, and the words' number.

    Args:
        logits: (B, L, V), of the text that starts with `[DEC]`.
        text: its ids and mask; padding is not predicted.

    Returns:
        Two tensors (B,).
    """
    real = text.mask[:, 1:].bool()
    targets = text.ids[:, 1:].masked_fill(~real, -100)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets.flatten(),
        label_smoothing=LABEL_SMOOTHING,
        reduction="none",
    )
    return losses.view(targets.shape).sum(dim=1), real.sum(dim=1)


@torch.no_grad()
def nearest_is_own(scores: Tensor, positives: Tensor) -> Tensor:
    """Return (B,), 1 where the highest of scores (B, A) is one of the positives (B, A), else 0."""
    return positives.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0].float()


@torch.no_grad()
def judged_right(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors (B,): pairs accepted, and negatives refused, of logits (3 B, 2)."""
    right = ((logits[:, 1] > logits[:, 0]) == targets).float().view(3, -1)
    return right[0], right[1:].mean(dim=0)
