"""What is a Q-Former trained on before it meets a language model? Three losses on picture and text.

Shapes: B pairs of this process, A pairs of all processes, K features of a view, D encoder width, Q
queries, L text tokens, P width of the shared space, V words.

BLIP-2's first stage: contrast (ITC), matching with hard negatives (ITM) and captioning (LM), with
equal weights. The losses are functions of tensors; `QFormerStage1` makes those tensors. Gathering
over processes, the optimiser and the data are the training stage's.

Surprises:
- LAVIS makes four passes: queries with picture, text alone, matching, and a caption that reads the
  first pass's keys and values from a cache. Here the first and the last are one: queries do not see
  a causal text, so that their rows are the same.
- Every loss but matching has label smoothing 0.1.
- The caption starts with `[DEC]` where the text has `[CLS]`.

Follows `lavis/models/blip2_models/blip2_qformer.py` of salesforce/LAVIS, without the soft targets
it has for pairs that share a picture.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.errors import UserError
from connectors.float32 import Float32Module
from connectors.key_table import KeyTable, Layout, Unsqueezed
from connectors.qformer_blocks import QFormer, QFormerSize, TextInput
from connectors.qformer_keys import qformer_keys

LABEL_SMOOTHING = 0.1


class Similarities(NamedTuple):
    """Similarity of each pair of this process to each of all, divided by the temperature."""

    image_to_text: Tensor  # (B, A)
    text_to_image: Tensor  # (B, A)


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


def contrastive_loss(similarity: Similarities, offset: int = 0) -> Tensor:
    """Return the mean of both directions' cross-entropy; pair b belongs to b + offset of all."""
    to_text, to_image = similarity
    targets = torch.arange(len(to_text), device=to_text.device) + offset
    by_image = F.cross_entropy(to_text, targets, label_smoothing=LABEL_SMOOTHING)
    return (by_image + F.cross_entropy(to_image, targets, label_smoothing=LABEL_SMOOTHING)) / 2


@torch.no_grad()
def draw_negatives(
    scores: Tensor, offset: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw for each pair one of the others, the likelier the more similar.

    Args:
        scores: (B, A), as in `Similarities`: `text_to_image` draws pictures, and the reverse.
        offset: where of all pairs this process's begin.
        generator: where the draw comes from.

    Returns:
        (B,), indices of 0 ... A - 1, never a pair's own.

    Raises:
        UserError: there is no other pair.
    """
    if scores.shape[1] < 2:
        raise UserError(
            "image-text matching draws its negatives from the other pairs of a step, and there is "
            "only one pair; raise the batch size to 2 or more"
        )
    own = torch.arange(len(scores), device=scores.device)[:, None] + offset
    others = torch.arange(scores.shape[1], device=scores.device) != own
    weights = scores.float().masked_fill(~others, float("-inf")).softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def matching_loss(logits: Tensor) -> Tensor:
    """Return the cross-entropy of (3 B, 2): B pairs, then 2 B that do not belong together."""
    targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    targets[: len(logits) // 3] = 1
    return F.cross_entropy(logits, targets)


def caption_loss(logits: Tensor, text: TextInput) -> Tensor:
    """Return the cross-entropy of each next word.

    Args:
        logits: (B, L, V), of the text that starts with `[DEC]`.
        text: its ids and mask; padding is not predicted.
    """
    targets = text.ids.masked_fill(~text.mask.bool(), -100)[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=LABEL_SMOOTHING
    )


class CaptionHead(nn.Module):
    """BERT's masked-language-model head: linear, GELU, norm, words."""

    def __init__(self, size: QFormerSize) -> None:
        super().__init__()
        assert size.vocab_size is not None
        self.dense = nn.Linear(size.hidden_dim, size.hidden_dim)
        self.norm = nn.LayerNorm(size.hidden_dim, eps=size.eps)
        self.decoder = nn.Linear(size.hidden_dim, size.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, V)."""
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class Encoded(NamedTuple):
    """What contrast and captioning need of B pairs."""

    queries: Tensor  # (B, Q, C)
    text: Tensor  # (B, C), the text's first row
    image_features: Tensor  # (B, Q, P), of length 1
    text_features: Tensor  # (B, P), of length 1
    caption_logits: Tensor  # (B, L, V)


class Stage1Losses(NamedTuple):
    """The three losses, to be added."""

    contrastive: Tensor
    matching: Tensor
    caption: Tensor


class QFormerStage1(Float32Module):
    """A Q-Former with the heads of its first stage."""

    def __init__(self, size: QFormerSize, shared_dim: int = 256, *, tie_words: bool = True) -> None:
        """Build Q-Former and heads.

        Args:
            size: the Q-Former's; it has a text and gives its output.
            shared_dim: P.
            tie_words: the caption's last layer is the table of words, as in published checkpoints.
        """
        super().__init__()
        assert size.vocab_size is not None and size.text_output, size
        self.qformer = QFormer(size)
        self.image_proj = nn.Linear(size.hidden_dim, shared_dim)
        self.text_proj = nn.Linear(size.hidden_dim, shared_dim)
        self.match_head = nn.Linear(size.hidden_dim, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.caption_head = CaptionHead(size)
        for layer in (self.caption_head.dense, self.caption_head.decoder):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if tie_words:
            self.caption_head.decoder.weight = self.qformer.word_embeddings.weight

    def encode(
        self, features: Tensor, text: TextInput, bos_id: int, mask: Tensor | None = None
    ) -> Encoded:
        """Read pictures and texts apart, and captions after their pictures.

        Args:
            features: (B, K, D).
            text: ids and mask (B, L); it starts with `[CLS]`.
            bos_id: `[DEC]`.
            mask: (B, K), True where a feature is real.
        """
        captions = self.qformer(
            features, start_with(text, bos_id), feature_mask=mask, causal_text=True
        )
        first = self.qformer(None, text).text[:, 0]
        return Encoded(
            captions.queries,
            first,
            F.normalize(self.image_proj(captions.queries), dim=-1),
            F.normalize(self.text_proj(first), dim=-1),
            self.caption_head(captions.text),
        )

    def match(self, features: Tensor, text: TextInput, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, 2): do features (B, K, D) and texts belong together?"""
        queries = self.qformer(features, text, feature_mask=mask).queries
        return self.match_head(queries).mean(dim=1)

    def forward(
        self,
        features: Tensor,
        text: TextInput,
        bos_id: int,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Stage1Losses:
        """Return the losses of B pairs in one process.

        Args:
            features: (B, K, D).
            text: ids and mask (B, L); it starts with `[CLS]`.
            bos_id: `[DEC]`.
            negatives: for each pair another's picture, and another's text; by default drawn.
            generator: where the draw comes from.

        Raises:
            UserError: a single pair has no negatives.
        """
        encoded = self.encode(features, text, bos_id)
        image, words = encoded.image_features, encoded.text_features
        scores = similarities(image, words, self.temperature, image, words)
        if negatives is None:
            negatives = (
                draw_negatives(scores.text_to_image, generator=generator),
                draw_negatives(scores.image_to_text, generator=generator),
            )
        other_image, other_text = negatives
        matches = self.match(
            torch.cat([features, features[other_image], features]),
            TextInput(*(torch.cat([part, part, part[other_text]]) for part in text)),
        )
        return Stage1Losses(
            contrastive_loss(scores),
            matching_loss(matches),
            caption_loss(encoded.caption_logits, start_with(text, bos_id)),
        )


def start_with(text: TextInput, bos_id: int) -> TextInput:
    """Return the text with its first token replaced."""
    first = torch.full_like(text.ids[:, :1], bos_id)
    return TextInput(torch.cat([first, text.ids[:, 1:]], dim=1), text.mask)


def stage1_keys(size: QFormerSize) -> KeyTable:
    """Return {LAVIS's key: ours} of a `QFormerStage1`."""
    keys: dict[str, str | Layout] = {
        theirs: f"qformer.{ours}" if isinstance(ours, str) else Unsqueezed("qformer.queries")
        for theirs, ours in qformer_keys(size, "lavis").items()
    }
    head, words = "Qformer.cls.predictions", "caption_head.decoder"
    keys |= {"temp": "temperature", f"{head}.bias": f"{words}.bias"}
    keys[f"{head}.decoder.weight"] = f"{words}.weight"
    modules = {"vision_proj": "image_proj", "text_proj": "text_proj", "itm_head": "match_head"}
    modules[f"{head}.transform.dense"] = "caption_head.dense"
    modules[f"{head}.transform.LayerNorm"] = "caption_head.norm"
    for theirs, ours in modules.items():
        keys |= {f"{theirs}.{n}": f"{ours}.{n}" for n in ("weight", "bias")}
    roots = ["Qformer", "query_tokens", "temp", "vision_proj", "text_proj", "itm_head"]
    if size.vision_norm_eps is not None:
        roots.append("ln_vision")
    idle = ("Qformer.bert.embeddings.position_ids", f"{head}.decoder.bias")
    return KeyTable(keys, roots, idle)
