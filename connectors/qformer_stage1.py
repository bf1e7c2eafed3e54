"""What is a Q-Former trained on before it meets a language model? Three losses on picture and text.

Shapes: B pairs of this process, A pairs of all processes, K features of a view, D encoder width, Q
queries, L text tokens, C the Q-Former's width, P width of the shared space, V words.

BLIP-2's first stage: contrast (ITC), matching with hard negatives (ITM) and captioning (LM), with
equal weights. The losses are in `connectors.qformer_losses`; the optimiser, the data and how
processes exchange what they hold are the training stage's.

Surprises:
- LAVIS makes four passes: queries with picture, text alone, matching, and a caption that reads the
  first pass's keys and values from a cache. Here the first and the last are one: queries do not see
  a causal text, so that their rows are the same.
- The caption starts with `[DEC]` where the text has `[CLS]`.

Follows `lavis/models/blip2_models/blip2_qformer.py` of salesforce/LAVIS.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.float32 import Float32Module
from connectors.key_table import KeyTable, Layout, Unsqueezed
from connectors.qformer_blocks import QFormer, QFormerSize
from connectors.qformer_keys import NAMES, qformer_keys
from connectors.qformer_losses import (
    Pairs,
    Stage1Output,
    belong_together,
    caption_loss,
    contrastive_loss,
    draw_negatives,
    judged_right,
    matching_loss,
    nearest_is_own,
    similarities,
)
from connectors.views import TextInput


def alone(x: Tensor) -> Tensor:
    """Return what all processes hold, where there is one: x itself."""
    return x


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
        pairs: Pairs,
        gather: Callable[[Tensor], Tensor] = alone,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Stage1Output:
        """Return losses and figures of B pairs, each compared with the A pairs of all processes.

        Args:
            features: (B, K, D).
            text: ids and mask (B, L); it starts with `[CLS]`.
            bos_id: `[DEC]`.
            pairs: which of them share a picture or a caption, and what decides the draw.
            gather: makes (A, ...), with gradients, of (B, ...); L is the same in all processes.
            negatives: for each pair another's picture, and another's text; by default drawn.
        """
        real = gather(pairs.real)
        kept = (real | ~real.any()).nonzero()[:, 0]  # has nobody a pair, what stands for one is

        def of_all(x: Tensor) -> Tensor:
            return gather(x)[kept]

        encoded = self.encode(features, text, bos_id)
        image, words = encoded.image_features, encoded.text_features
        scores = similarities(image, words, self.temperature, of_all(image), of_all(words))
        positives = belong_together(pairs, of_all(pairs.picture), of_all(pairs.caption))
        if negatives is None:
            negatives = (
                draw_negatives(scores.text_to_image, positives, pairs.draws[:, 0]),
                draw_negatives(scores.image_to_text, positives, pairs.draws[:, 1]),
            )
        other_image, other_text = (kept[other] for other in negatives)
        logits = self.match(
            torch.cat([features, gather(features)[other_image], features]),
            TextInput(*(torch.cat([part, part, gather(part)[other_text]]) for part in text)),
        )
        fits = [positives.gather(1, other[:, None])[:, 0] for other in negatives]
        targets = torch.cat([torch.ones_like(fits[0]), *fits])
        return Stage1Output(
            contrastive_loss(scores, positives),
            matching_loss(logits, targets),
            *caption_loss(encoded.caption_logits, start_with(text, bos_id)),
            nearest_is_own(scores.image_to_text, positives),
            nearest_is_own(scores.text_to_image, positives),
            positives.float().mean(dim=1),
            *judged_right(logits, targets),
        )


def start_with(text: TextInput, bos_id: int) -> TextInput:
    """Return the text with its first token replaced."""
    first = torch.full_like(text.ids[:, :1], bos_id)
    return TextInput(torch.cat([first, text.ids[:, 1:]], dim=1), text.mask)


def stage1_keys(size: QFormerSize) -> KeyTable:
    """Return {LAVIS's key: ours} of a `QFormerStage1`."""
    keys = _qformer_keys(size, "lavis")
    head, words = "Qformer.cls.predictions", "caption_head.decoder"
    keys |= {"temp": "temperature", f"{head}.bias": f"{words}.bias"}
    keys[f"{head}.decoder.weight"] = f"{words}.weight"
    keys |= _modules({"vision_proj": "image_proj", "text_proj": "text_proj"})
    keys |= _modules({"itm_head": "match_head", f"{head}.transform.dense": "caption_head.dense"})
    keys |= _modules({f"{head}.transform.LayerNorm": "caption_head.norm"})
    roots = ["Qformer", "query_tokens", "temp", "vision_proj", "text_proj", "itm_head"]
    if size.vision_norm_eps is not None:
        roots.append("ln_vision")
    idle = ("Qformer.bert.embeddings.position_ids", f"{head}.decoder.bias")
    return KeyTable(keys, roots, idle)


def retrieval_keys(size: QFormerSize) -> KeyTable:
    """Return {key of transformers' Blip2ForImageTextRetrieval: ours} of a `QFormerStage1`.

    That model has neither temperature nor caption head.
    """
    names = {"qformer.embeddings.layernorm": "qformer.layernorm"}
    names |= {"qformer.embeddings": "embeddings"}
    keys: dict[str, str | Layout] = {}
    for theirs, ours in _qformer_keys(size, "hf").items():
        for instructblip, retrieval in names.items():
            theirs = theirs.replace(instructblip, retrieval)
        keys[theirs] = ours
    heads = {"vision_projection": "image_proj", "text_projection": "text_proj"}
    keys |= _modules({**heads, "itm_head": "match_head"})
    tables = ("embeddings.word_embeddings", "embeddings.position_embeddings")
    roots = ["qformer", "query_tokens", *tables, *heads, "itm_head"]
    if size.vision_norm_eps is not None:
        roots.append("vision_model.post_layernorm")
    return KeyTable(keys, roots)


def _qformer_keys(size: QFormerSize, style: Literal["lavis", "hf"]) -> dict[str, str | Layout]:
    """Return the published keys of the Q-Former in a `QFormerStage1`."""
    return {
        theirs: f"qformer.{ours}" if isinstance(ours, str) else Unsqueezed("qformer.queries")
        for theirs, ours in qformer_keys(size, style).items()
    }


def _modules(names: dict[str, str]) -> dict[str, str | Layout]:
    """Return {published key: ours} of modules with weight and bias, {published: ours}."""
    return {f"{theirs}.{n}": f"{ours}.{n}" for theirs, ours in names.items() for n in NAMES}
