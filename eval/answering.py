"""How does a model answer a batch of questions: what it writes, and how likely each letter is?

One pass serves both: the reply is generated greedily, and its key-value cache is reused to score
the option letters. With the strategy "reason" the letters are scored after the reasoning the model
wrote, with "direct" right after the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.identity import fingerprint_processor, fingerprint_weights
from eval.settings import AnswerSettings
from vlm.answers import Reading, read_answer
from vlm.option_scores import (
    Continuations,
    can_share_prefix,
    continuations,
    options_behind,
    score_plainly,
    score_with_cache,
)
from vlm.video import VideoSource


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as the processor encodes it, and its options."""

    encoded: Mapping[str, Any]
    choices: tuple[str, ...]

    @property
    def length(self) -> int:
        """Number of tokens, pictures included."""
        return len(self.encoded["input_ids"])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model made of one question; None where it was not asked for.

    `finished` is false where `max_new_tokens` cut the reply.
    """

    reply: str | None
    reading: Reading | None
    log_likelihoods: tuple[float, ...] | None
    finished: bool | None


class ModelAnswerer:
    """A loaded model with its processor, answering multiple-choice questions in batches."""

    def __init__(self, model: Any, processor: Any, settings: AnswerSettings) -> None:
        self.model = model.eval()
        self.processor = processor
        self.settings = settings
        tokenizer = processor.tokenizer
        ends = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {
            None
        }
        padding = tokenizer.pad_token_id
        self._padding = padding if padding is not None else tokenizer.eos_token_id

    def identity(self) -> dict[str, str]:
        """Return fingerprints that change when the weights or the processor change."""
        return {
            "weights": fingerprint_weights(self.model),
            "processor": fingerprint_processor(self.processor),
        }

    def encode(
        self,
        messages: list[dict[str, Any]],
        media: list[Image.Image | VideoSource],
        choices: tuple[str, ...],
    ) -> Question:
        """Return one question ready for batching; of videos, frames as the model looks at them."""
        sample = self.processor.image_processor.sample
        encoded = self.processor.encode(
            messages,
            [each for each in media if isinstance(each, Image.Image)],
            videos=[sample(each) for each in media if not isinstance(each, Image.Image)],
            add_generation_prompt=True,
        )
        return Question(encoded=encoded, choices=choices)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer a batch; no question's answer depends on the others beyond float rounding."""
        encoded = [question.encoded for question in questions]
        batch = self._collate(encoded)
        sequences, cache = self._generate(batch)
        generated = sequences[:, batch["input_ids"].shape[1] :].tolist()
        replies_ids = [self._until_end(row) for row in generated]
        replies = self.processor.tokenizer.batch_decode(
            replies_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        readings = [
            read_answer(reply, question.choices)
            for reply, question in zip(replies, questions, strict=True)
        ]
        scores: list[list[float]] | None = None
        if "likelihood" in self.settings.scorings:
            options = self._options(questions, replies, replies_ids, readings)
            if can_share_prefix(cache):
                mask = batch["attention_mask"]
                scores = score_with_cache(self.model, cache, sequences, mask, options)
            else:
                scores = score_plainly(self.model, self._collate, encoded, options)
        written = self.settings.generates
        return [
            Answer(
                reply=replies[i] if written else None,
                reading=readings[i] if written else None,
                log_likelihoods=None if scores is None else tuple(scores[i]),
                finished=len(replies_ids[i]) < len(generated[i]) if written else None,
            )
            for i in range(len(questions))
        ]

    def _collate(self, encoded: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad on the left, so that every row continues at the same column."""
        batch = self.processor.collate(list(encoded), padding_side="left")
        return {
            name: value.to(self.model.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _generate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return prompt and reply (B, P + G), and the cache of all but the last column.

        Where no reply is asked for, one token is generated for the sake of the prompt's cache.
        """
        output = self.model.generate(
            **batch,
            max_new_tokens=self.settings.max_new_tokens if self.settings.generates else 1,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._padding,
            eos_token_id=sorted(self._ends),
            return_dict_in_generate=True,
            use_cache=True,
        )
        return output.sequences, output.past_key_values

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        """Return the reply's tokens before the first end-of-turn token."""
        for place, token in enumerate(ids):
            if token in self._ends:
                return list(ids[:place])
        return list(ids)

    def _options(
        self,
        questions: Sequence[Question],
        replies: Sequence[str],
        replies_ids: Sequence[Sequence[int]],
        readings: Sequence[Reading],
    ) -> list[Continuations]:
        """Return per question the token ids of its options.

        Under "reason" they stand in the place of the letter read in the reply; where none was
        read, "(A)", "(B)", ... follow the whole reply. Under "direct" they follow the prompt.
        """
        reason = self.settings.strategy == "reason"
        found = [
            options_behind(reply, ids, reading.position, len(question.choices))
            if reason
            else options_behind("", (), None, len(question.choices))
            for question, reply, ids, reading in zip(
                questions, replies, replies_ids, readings, strict=True
            )
        ]
        flat = [text for texts, _ in found for text in texts]  # one call: its overhead is per call
        ids_of = iter(self.processor.tokenizer(flat, add_special_tokens=False)["input_ids"])
        return [
            continuations(
                [[*before, *next(ids_of)] for _ in texts],
                ids if reason else (),
            )
            for (texts, before), ids in zip(found, replies_ids, strict=True)
        ]
