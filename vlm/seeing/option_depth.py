"""How likely is each option of a multiple-choice question, and how does that form over the layers?

After each layer the hidden state goes through the final norm and the head, as if the layers behind
were not there (the "logit lens"). The last line is what `vlm eval` scores.

Shapes: M layers, F positions looked at, O options, E language-model width, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.answers import LETTERS, read_answer
from vlm.errors import UserError
from vlm.modeling import VlmForConditionalGeneration
from vlm.option_scores import Continuations, branches, continuations, options_behind
from vlm.processing import VlmProcessor
from vlm.seeing.passes import LastPositions, last_positions
from vlm.video import SampledVideo

OPTION = re.compile(
    r"(?:^|(?<=[\s(,;:?.]))\(?([A-Z])[).:]\s+(\S[^\n]*?)(?=\s*\(?[A-Z][).:]\s|\s*$)", re.M
)


@dataclass(frozen=True)
class OptionDepth:
    """The options of a question, and how likely each is.

    Attributes:
        texts: of (A), (B), ...
        log_likelihoods: (M + 1, O) after the embedding and after each layer; the last is the
            model's own.
        before: what of the answer stands before the letter.
        chosen: number of the option that the answer chose; None: none was read.
    """

    texts: tuple[str, ...]
    log_likelihoods: Tensor
    before: str
    chosen: int | None

    def among_options(self) -> Tensor:
        """Return (M + 1, O) probabilities that add up to 1 in each line."""
        return self.log_likelihoods.softmax(-1)


def question_options(question: str) -> tuple[str, ...]:
    """Return the texts of a question's options "(A) one", "B. two", "C) three"; none: empty.

    They count only where they begin with A and follow one another.
    """
    found = list(OPTION.finditer(question))
    for start in range(len(found)):
        run = []
        for match, letter in zip(found[start:], LETTERS, strict=False):
            if match[1] != letter:
                break
            run.append(match[2].strip().rstrip(",;"))
        if len(run) >= 2:
            return tuple(run)
    return ()


@torch.inference_mode()
def option_depth(
    model: VlmForConditionalGeneration,
    processor: VlmProcessor,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Image.Image],
    videos: Sequence[SampledVideo] = (),
) -> OptionDepth:
    """Return how likely each option of a conversation's last question is, layer by layer.

    With an answer, the letters are scored in the place of the letter that it chose, so that its
    reasoning counts; where no letter was read, behind it: as `vlm eval` does.

    Args:
        model: in eval mode.
        processor: its processor.
        messages: up to the question, or its answer; see `vlm.conversations`.
        images: decoded, in order.
        videos: sampled, in order.

    Raises:
        UserError: the question has no options, or the model's final norm was not found.
    """
    reply = ""
    if messages and messages[-1]["role"] == "assistant":
        reply, messages = _text(messages[-1]), messages[:-1]
    texts = question_options(_text(messages[-1])) if messages else ()
    if not texts:
        raise UserError("the question has no options such as (A) left (B) right")
    reading = read_answer(reply, texts)
    chosen = None if reading.letter is None else LETTERS.index(reading.letter)
    tokenizer = processor.tokenizer
    reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"] if reply else []
    option_texts, before = options_behind(reply, reply_ids, reading.position, len(texts))
    option_ids = tokenizer(option_texts, add_special_tokens=False)["input_ids"]
    options = continuations([[*before, *ids] for ids in option_ids], reply_ids)
    encoded = processor.encode(messages, images, videos=videos, add_generation_prompt=True)
    scores = score_by_layer(model, processor, encoded, options)
    return OptionDepth(texts, scores, reply[: reading.position], chosen)


def score_by_layer(
    model: VlmForConditionalGeneration,
    processor: VlmProcessor,
    encoded: Mapping[str, Tensor],
    options: Continuations,
) -> Tensor:
    """Return (M + 1, O) log-likelihoods of each option's tokens behind those that all share.

    Args:
        model: in eval mode.
        processor: its processor.
        encoded: the conversation up to the answer, unbatched.
        options: of the answer, see `vlm.option_scores`.
    """
    scores: dict[int, Tensor] = {}
    for inputs, members in branches(options).items():
        tail = torch.tensor([*options.ids[0][: options.shared], *inputs], dtype=torch.long)
        ids = torch.cat([encoded["input_ids"], tail])
        whole = {**encoded, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch = processor.collate([whole], padding_side="left")
        looked_at = 1 + len(inputs)
        run = last_positions(model, batch, len(ids) - looked_at)
        log_probs = _log_probs_by_layer(run, len(ids), looked_at)  # (M + 1, F, V)
        common = sum(log_probs[:, t, token] for t, token in enumerate(inputs))
        for option in members:
            scores[option] = common + log_probs[:, -1, options.ids[option][-1]]
    return torch.stack([scores[option] for option in range(len(options.ids))], dim=1).cpu()


def _log_probs_by_layer(run: LastPositions, length: int, looked_at: int) -> Tensor:
    """Return (M + 1, F, V) log-probabilities of the last F positions after each layer."""
    norm, output = _run_to_norm(run, length)
    *states, _ = output.hidden_states  # the last is normed in most families
    normed = [norm(state[:, -looked_at:])[0] for state in states]
    normed.append(output.last_hidden_state[0, -looked_at:])
    logits = torch.stack([run.model.compute_logits(state) for state in normed])
    return logits.float().log_softmax(-1)


def _run_to_norm(run: LastPositions, length: int) -> tuple[nn.Module, Any]:
    """Run the last positions; return the module that made the last hidden state, and the output.

    Families call their final norm differently, so it is found by what it returns.
    """
    language_model = run.model.model.language_model
    last: list[tuple[nn.Module, Any]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last[:] = [(module, output)]

    hooks = [
        module.register_forward_hook(keep)
        for module in language_model.modules()
        if module is not language_model
    ]
    try:
        output = run.run(length, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    made = last[0][1] if last else None
    final: Tensor = output.last_hidden_state  # pyright: ignore[reportAssignmentType]
    found = isinstance(made, Tensor) and made.data_ptr() == final.data_ptr()
    if not found or not output.hidden_states:
        raise UserError(
            f"{type(language_model).__name__} does not tell its layers' hidden states in a way "
            "known here, so how the choice forms cannot be shown"
        )
    return last[0][0], output


def _text(message: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(entry["text"] for entry in content if entry["type"] == "text")
