"""How do hidden states become logits, and a loss that never holds all of them?

Shapes: B batch, L sequence, R supervised rows, E language-model width, V vocabulary.
"""

from collections.abc import Callable
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from vlm.head_loss import is_plain, linear_loss
from vlm.processing import IGNORE


def usual_chunk_elements(on_gpu: bool) -> int:
    """Return how many logits a loss holds at once: 256 MiB, on a CPU 128 MiB in float32.

    On a GPU products of few rows are slow.
    """
    return 2**26 if on_gpu else 2**25


def logit_transform(text_config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """Return what a language model does to its head's output, None for nothing.

    transformers applies these in each `...ForCausalLM.forward`, outside the head, so a model that
    owns the head has to repeat them. Families are listed exactly; `VlmForConditionalGeneration.
    from_components` compares with the language model's own logits and refuses others.
    """
    match text_config.model_type:
        case "gemma2" | "gemma3_text" | "gemma3n_text":
            cap = text_config.final_logit_softcapping
            return None if cap is None else lambda logits: torch.tanh(logits / cap) * cap
        case "xlstm":
            cap = text_config.output_logit_soft_cap
            return lambda logits: torch.tanh(logits / cap) * cap
        case "cohere" | "cohere2":
            scale = text_config.logit_scale
            return lambda logits: logits * scale
        case "falcon_h1":
            multiplier = text_config.lm_head_multiplier
            return lambda logits: logits * multiplier
        case "granite" | "granitemoe" | "granitemoehybrid":
            divisor = text_config.logits_scaling
            return lambda logits: logits / divisor
        case _:
            return None


def supervised(labels: Tensor, new_document: Tensor | None) -> Tensor:
    """Return (B, L - 1) True where position t is to predict the label of t + 1.

    `labels` (B, L) are IGNORE where nothing is learnt; `new_document` is of `document_starts`.
    """
    learnt = labels[:, 1:] != IGNORE
    return learnt if new_document is None else learnt & ~new_document


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    num_items: Tensor | int | None = None,
    new_document: Tensor | None = None,
    weights: Tensor | None = None,
    chunk_elements: int | None = None,
    agree: Callable[[int], int] | None = None,
    head_weight: Tensor | None = None,
) -> Tensor:
    """Return the next-token cross-entropy over the supervised positions only.

    Rows whose next label is IGNORE never reach the head, and the others go through it in chunks, so
    that neither pass holds more than `chunk_elements` logits. A plain linear head's gradient
    is computed with its loss (`vlm.head_loss`); with another head and more than one chunk, each is
    computed again in the backward pass. The head runs at least once, on no rows if need be: other
    processes may wait for its weights or for their gradients.

    Args:
        hidden: (B, L, E) last hidden states.
        labels: (B, L) ids, IGNORE where nothing is learnt; shifted here.
        head: hidden rows (R, E) -> logits (R, V); called also if there are none, so that its
            parameters always get a gradient.
        vocab_size: V.
        num_items: what the sum is divided by (supervised tokens, or their weights, over
            accumulation and ranks); None: by those of this batch.
        new_document: (B, L - 1) True where position t + 1 starts another packed document, which
            position t must not be asked to predict.
        weights: (B, L) what each label's loss is multiplied by; None: 1.
        chunk_elements: how many logits may exist at once; None: as suits the device.
        agree: makes of this process's number of chunks that of all, where they have to run the head
            equally often; None: they need not.
        head_weight: (V, E) in place of a plain head's own, see `vlm.tied_head`.
    """
    learnt = supervised(labels, new_document)
    rows, targets = hidden[:, :-1][learnt], labels[:, 1:][learnt]  # (R, E), (R,)
    scales = None if weights is None else weights[:, 1:][learnt]  # (R,)

    if chunk_elements is None:
        chunk_elements = usual_chunk_elements(hidden.device.type != "cpu")
    size = max(1, chunk_elements // vocab_size)
    if num_items is None:
        num_items = max(1, len(rows)) if scales is None else scales.sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(rows.device)
    if agree is None and isinstance(head, nn.Linear) and is_plain(head):
        weight = head.weight if head_weight is None else head_weight
        return linear_loss(rows, weight, head.bias, targets, scales, num_items, size)

    count = max(1, -(-len(rows) // size))
    if agree is not None:
        count = agree(count)
    return _chunked_sum(rows, targets, scales, head, size, count) / num_items


def _chunked_sum(
    rows: Tensor,
    targets: Tensor,
    scales: Tensor | None,
    head: Callable[[Tensor], Tensor],
    size: int,
    count: int,
) -> Tensor:
    """Return the summed losses of rows (R, E) by `count` chunks of `size` rows, the last ones less.

    More than one are computed again in the backward pass.
    """

    def chunk_sum(chunk: Tensor, chunk_targets: Tensor, chunk_scales: Tensor | None) -> Tensor:
        if chunk_scales is None:
            return F.cross_entropy(head(chunk).float(), chunk_targets, reduction="sum")
        losses = F.cross_entropy(head(chunk).float(), chunk_targets, reduction="none")
        return (losses * chunk_scales).sum()

    if count == 1:
        return chunk_sum(rows, targets, scales)

    def cut(x: Tensor) -> tuple[Tensor, ...]:
        chunks = x.split(size)
        return (*chunks, *repeat(x[:0], count - len(chunks)))

    chunks = cut(rows), cut(targets), repeat(None) if scales is None else cut(scales)
    sums = [
        checkpoint(chunk_sum, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=False)
    ]
    return torch.stack(sums).sum()


def document_starts(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Return (B, L - 1) True where position t + 1 starts another packed document; None if none do.

    A document starts where position_ids do not go on by one. Padding is not looked at: its
    positions restart in every left-padded batch.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    starts = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            return None  # the caller made the whole mask
        real = attention_mask.bool()
        starts = starts & real[:, 1:] & real[:, :-1]
    return starts if bool(starts.any()) else None
