"""How likely does the model find each option's letter as the continuation of what came before?

A score is the sum of the log-probabilities of the continuation's tokens: higher is better, always
at most zero. The prefix (picture, question, reasoning) is computed once: its keys and values are
already in the cache that generation leaves behind, so an option costs a forward of a few tokens.
Models whose layers keep no full key-value history (recurrent, sliding window) take the plain path,
one whole forward per option, with equal results.

Shapes: B batch, P prompt length (left padded), G generated length, F fed tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from vlm.answers import LETTERS


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """What follows the prompt, per option: `ids[option]`, of which all share `ids[0][:shared]`.

    The shared tokens are also the first tokens of the generated reply, so they stand in its cache.
    """

    ids: tuple[tuple[int, ...], ...]
    shared: int


def option_texts(reply: str, position: int, num_options: int) -> list[str]:
    """Return the reply with the letter at `position` replaced by each option's, cut off behind it.

    The reasoning before the letter stays, so the scores are conditioned on it.
    """
    prefix, letter, closing = reply[:position], reply[position], reply[position + 1 : position + 2]
    return [
        prefix + (x.lower() if letter.islower() else x) + (")" if closing == ")" else "")
        for x in LETTERS[:num_options]
    ]


def options_behind(
    reply: str, reply_ids: Sequence[int], position: int | None, num_options: int
) -> tuple[list[str], Sequence[int]]:
    """Return the options' texts, and the reply's tokens that stand before them.

    Args:
        reply: what the model wrote; "" to score right behind the prompt.
        reply_ids: its tokens.
        position: of the letter that was read in it; None: "(A)", "(B)", ... follow the whole reply.
        num_options: how many there are.
    """
    if position is not None:
        return option_texts(reply, position, num_options), ()
    space = " " if len(reply_ids) and not reply[-1:].isspace() else ""
    return [f"{space}({letter})" for letter in LETTERS[:num_options]], reply_ids


def continuations(option_ids: Sequence[Sequence[int]], reply_ids: Sequence[int]) -> Continuations:
    """Return the options' token ids up to the one that tells them apart.

    The options' whole texts are tokenised and compared with the reply's own ids, because a
    tokenizer may merge the letter with what stands around it; the cut then falls before the merge.
    What follows the letter in all options alike (the closing bracket) says nothing and is dropped.
    """
    ids = [tuple(row) for row in option_ids]
    shared = 0
    for tokens in zip(reply_ids, *ids, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    # At least one token of every option must be scored, even where one is the other's beginning.
    shared = min(shared, *(len(row) - 1 for row in ids))
    while len({row[-1] for row in ids}) == 1 and min(map(len, ids)) > shared + 1:
        ids = [row[:-1] for row in ids]
    return Continuations(ids=tuple(ids), shared=shared)


def can_share_prefix(cache: Cache | None) -> bool:
    """Say whether every layer keeps all keys and values, so that columns can be masked out."""
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


@torch.inference_mode()
def score_with_cache(
    model: PreTrainedModel,
    cache: Cache,
    sequences: Tensor,
    prompt_mask: Tensor,
    options: Sequence[Continuations],
) -> list[list[float]]:
    """Return the log-likelihood of every option after its row's prompt and shared reply tokens.

    Args:
        model: the language or vision-language model; called without pictures.
        cache: keys and values of the first columns of `sequences`; restored before returning.
        sequences: (B, P + G) prompt and generated tokens.
        prompt_mask: (B, P) 0 at left padding.
        options: B rows.

    A row's cached reply beyond its shared tokens is masked out, and its last kept token is fed
    again, because its logits predict the first scored token and are no longer at hand.
    """
    batch, prompt_length = prompt_mask.shape
    cached = cache.get_seq_length()
    kept = torch.tensor([prompt_length + row.shared - 1 for row in options])  # (B,) columns kept
    assert int(kept.max()) <= cached, f"{int(kept.max())} columns kept, {cached} cached"
    columns = torch.arange(cached)
    visible = torch.ones(batch, cached, dtype=torch.long)
    visible[:, :prompt_length] = prompt_mask.cpu()[:, :cached]
    visible = visible * (columns[None] < kept[:, None])  # (B, cached)
    anchors = sequences.cpu()[torch.arange(batch), kept]  # (B,)
    starts = visible.sum(1)  # (B,) position of the anchor

    scores = [[0.0] * len(row.ids) for row in options]
    # Options that differ in their last token alone, the usual case, are read off one forward.
    groups = [branches(row) for row in options]
    for number in range(max(map(len, groups))):
        chosen = [list(row)[min(number, len(row) - 1)] for row in groups]
        width = 1 + max(map(len, chosen))
        fed = torch.zeros(batch, width, dtype=torch.long)  # (B, F)
        mask = torch.zeros(batch, width, dtype=torch.long)
        for i, inputs in enumerate(chosen):
            fed[i, : 1 + len(inputs)] = torch.tensor([int(anchors[i]), *inputs])
            mask[i, : 1 + len(inputs)] = 1
        logits = model(
            input_ids=fed.to(model.device),
            attention_mask=torch.cat([visible, mask], dim=1).to(model.device),
            position_ids=(starts[:, None] + torch.arange(width)).to(model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits  # (B, F, V)
        cache.crop(-width)
        log_probs = logits.float().log_softmax(-1).cpu()
        for i, inputs in enumerate(chosen):
            common = sum(float(log_probs[i, t, token]) for t, token in enumerate(inputs))
            for option in groups[i][inputs]:
                last = options[i].ids[option][-1]
                scores[i][option] = common + float(log_probs[i, len(inputs), last])
    return scores


def branches(row: Continuations) -> dict[tuple[int, ...], list[int]]:
    """Group a row's options by the tokens to feed: all behind the shared ones but the last."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for option, ids in enumerate(row.ids):
        groups.setdefault(ids[row.shared : -1], []).append(option)
    return groups


@torch.inference_mode()
def score_plainly(
    model: PreTrainedModel,
    collate: Callable[[list[dict[str, Tensor]]], Mapping[str, Tensor]],
    encoded: Sequence[Mapping[str, Any]],
    options: Sequence[Continuations],
) -> list[list[float]]:
    """Return what `score_with_cache` returns, by one whole forward per option.

    Args:
        model: the model; called with pictures.
        collate: pads encoded examples on the left and moves them to the model's device.
        encoded: B unbatched prompts as the processor encodes them.
        options: B rows.
    """
    scores: list[list[float]] = [[] for _ in options]
    for number in range(max(len(row.ids) for row in options)):
        rows = [i for i, row in enumerate(options) if number < len(row.ids)]
        tails = [options[i].ids[number] for i in rows]
        width = 1 + max(map(len, tails))
        batch = collate([_extended(encoded[i], tail) for i, tail in zip(rows, tails, strict=True)])
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generation counts
        logits = model(
            **batch, position_ids=positions, use_cache=False, logits_to_keep=width
        ).logits  # (B, F, V)
        ids = batch["input_ids"][:, -width:].cpu()
        mask = torch.zeros_like(ids)
        for i, (row, tail) in enumerate(zip(rows, tails, strict=True)):
            mask[i, width - (len(tail) - options[row].shared) :] = 1
        log_probs = logits[:, :-1].float().log_softmax(-1).cpu()
        picked = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, F)
        for row, value in zip(rows, (picked.double() * mask[:, 1:]).sum(1).tolist(), strict=True):
            scores[row].append(value)
    return scores


def _extended(encoded: Mapping[str, Any], tail: Sequence[int]) -> dict[str, Tensor]:
    """Return an encoded prompt with token ids appended."""
    ids = torch.cat([encoded["input_ids"], torch.tensor(tail, dtype=encoded["input_ids"].dtype)])
    return {**encoded, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
