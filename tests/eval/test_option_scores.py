"""Are option scores the true log-likelihoods, whatever path, batch and padding they come from?"""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from eval.answering import ModelAnswerer
from eval.settings import AnswerSettings
from vlm.answers import read_answer
from vlm.option_scores import (
    Continuations,
    can_share_prefix,
    continuations,
    option_texts,
    score_plainly,
    score_with_cache,
)

QUESTIONS = [
    ("Relation 1? Select from the following choices.\n(A) left\n(B) right", ("left", "right")),
    ("Count 22 of some length? Select.\n(A) 3\n(B) 2\n(C) 1\n(D) 0", ("3", "2", "1", "0")),
    ("Depth 3?\n(A) lamp\n(B) door", ("lamp", "door")),
]


@pytest.fixture(params=["letter alone", "letter merged with its brackets"])
def any_vlm(request, tiny_vlm, merging_vlm):
    merges = request.param == "letter merged with its brackets"
    model, processor = merging_vlm if merges else tiny_vlm
    assert ("(B)" in processor.tokenizer.tokenize("so (B)")) == merges
    return model, processor


def ask(tiny_vlm, blind: bool, **settings):
    model, processor = tiny_vlm
    answerer = ModelAnswerer(model, processor, AnswerSettings(**settings))
    content = [] if blind else [{"type": "image"}]
    images = [] if blind else [Image.new("RGB", (20, 30), (200, 30, 90))]
    return answerer, [
        answerer.encode(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            images,
            choices,
        )
        for text, choices in QUESTIONS
    ]


@torch.no_grad()
def log_likelihoods(tiny_vlm, question, whole: str, after: str = "") -> list[float]:
    """Sum the options' log-probabilities behind `after`, by plain forwards without padding.

    `whole` has a place for the letter. Tokens that end all options alike are left out.
    """
    model, processor = tiny_vlm

    def tokenize(text):
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    start = len(tokenize(after))
    options = [tokenize(whole.format(x)) for x in "ABCDEF"[: len(question.choices)]]
    assert all(ids[:start] == tokenize(after) for ids in options)
    while len({ids[-1] for ids in options}) == 1:
        options = [ids[:-1] for ids in options]
    sums = []
    for ids in options:
        batch = {k: v[None] if v.ndim == 1 else v for k, v in question.encoded.items()}
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        log_probs = model(**batch).logits[0].log_softmax(-1)
        length = batch["input_ids"].shape[1]
        places = range(length - len(ids) + start, length)
        sums.append(sum(float(log_probs[p - 1, batch["input_ids"][0, p]]) for p in places))
    return sums


@pytest.mark.parametrize("blind", [False, True])
def test_direct_scores_are_the_log_likelihoods_behind_the_prompt(any_vlm, blind: bool):
    answerer, questions = ask(any_vlm, blind, strategy="direct", scorings=("likelihood",))
    for question, answer in zip(questions, answerer.answer(questions), strict=True):
        assert answer.reply is None and answer.reading is None
        assert answer.log_likelihoods is not None
        wanted = log_likelihoods(any_vlm, question, "({})")
        assert answer.log_likelihoods == pytest.approx(wanted, abs=1e-4)
        assert len(wanted) == len(question.choices) and max(wanted) < 0


def test_generating_first_does_not_change_direct_scores(tiny_vlm):
    answerer, questions = ask(tiny_vlm, False, strategy="direct", scorings=("likelihood",))
    alone = answerer.answer(questions)
    both, _ = ask(tiny_vlm, False, strategy="direct", max_new_tokens=9)
    for one, other in zip(alone, both.answer(questions), strict=True):
        assert other.reply
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)


class Scripted:
    """The tiny model, made to reply with given texts; its likelihoods stay its own."""

    def __init__(self, model, processor, replies: list[str]) -> None:
        self.model, self.processor, self.replies = model, processor, replies
        self.device = model.device
        self.generation_config = model.generation_config

    def eval(self):
        return self

    def __call__(self, **inputs):
        return self.model(**inputs)

    def generate(self, **inputs):
        prompt, mask = inputs["input_ids"], inputs["attention_mask"]
        end = self.processor.tokenizer.eos_token_id
        rows = [
            self.processor.tokenizer(r, add_special_tokens=False)["input_ids"] for r in self.replies
        ]
        width = max(map(len, rows)) + 1
        new = torch.tensor([row + [end] * (width - len(row)) for row in rows])
        sequences = torch.cat([prompt, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)[:, :-1]
        images = {
            k: inputs[k] for k in ("pixel_values", "tile_grids", "image_sizes") if k in inputs
        }
        cache = self.model(
            input_ids=sequences[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            **images,
        ).past_key_values
        return SimpleNamespace(sequences=sequences, past_key_values=cache)


REPLIES = ["red y7 blue y4 so below (B)", "The answer is C.", "nothing to be read here"]
WHOLES = ["red y7 blue y4 so below ({})", "The answer is {}", "nothing to be read here ({})"]
REASONING = ["red y7 blue y4 so below", "The answer is", "nothing to be read here"]


@pytest.mark.parametrize("blind", [False, True])
def test_reason_scores_are_the_log_likelihoods_behind_the_reasoning(any_vlm, blind: bool):
    model, processor = any_vlm
    _, questions = ask(any_vlm, blind)
    answerer = ModelAnswerer(Scripted(model, processor, REPLIES), processor, AnswerSettings())
    for number, answer in enumerate(answerer.answer(questions)):
        assert answer.reply == REPLIES[number] and answer.finished
        wanted = log_likelihoods(any_vlm, questions[number], WHOLES[number], REASONING[number])
        got = answer.log_likelihoods
        # What all options share behind the reasoning (" (") is scored for all of them or for none.
        assert [x - got[0] for x in got] == pytest.approx([x - wanted[0] for x in wanted], abs=1e-4)
        assert max(got) < 0


def test_plain_path_gives_the_same_scores(any_vlm, monkeypatch):
    answerer, questions = ask(any_vlm, False, max_new_tokens=6)
    cached = answerer.answer(questions)
    monkeypatch.setattr("eval.answering.can_share_prefix", lambda cache: False)
    plain = answerer.answer(questions)
    for one, other in zip(cached, plain, strict=True):
        assert one.reply == other.reply
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)


def test_answers_do_not_depend_on_the_batch(tiny_vlm):
    answerer, questions = ask(tiny_vlm, False, max_new_tokens=12)
    together = answerer.answer(questions)
    for question, answer in zip(questions, together, strict=True):
        alone = answerer.answer([question])[0]
        assert alone.reply == answer.reply
        assert alone.finished == answer.finished
        assert alone.log_likelihoods == pytest.approx(answer.log_likelihoods, abs=1e-4)


def test_the_picture_matters_and_is_missing_when_blind(tiny_vlm):
    answerer, seeing = ask(tiny_vlm, False, strategy="direct", scorings=("likelihood",))
    _, blind = ask(tiny_vlm, True)
    assert "pixel_values" in seeing[0].encoded and "pixel_values" not in blind[0].encoded
    seen, unseen = answerer.answer(seeing)[0], answerer.answer(blind)[0]
    assert seen.log_likelihoods != pytest.approx(unseen.log_likelihoods, abs=1e-3)


@torch.no_grad()
def test_an_oracle_has_the_best_score(tiny_vlm):
    """A model whose next token after "(" is certain to be B: higher is better, B wins."""
    model, processor = tiny_vlm
    letter = processor.tokenizer("(B", add_special_tokens=False)["input_ids"][-1]

    class Oracle(Scripted):
        def __call__(self, **inputs):
            output = self.model(**inputs)
            output.logits[..., letter] += 50.0
            return output

    _, questions = ask(tiny_vlm, False)
    oracle = Oracle(model, processor, ["so (", "so (", "so ("])
    for answer in ModelAnswerer(oracle, processor, AnswerSettings()).answer(questions):
        assert answer.log_likelihoods.index(max(answer.log_likelihoods)) == 1


def test_option_texts_keep_the_reasoning_and_the_replys_own_style():
    choices = ("3", "2", "1")

    def texts(reply: str) -> list[str]:
        return option_texts(reply, read_answer(reply, choices).position, 3)

    assert texts("red y7 so below (B)") == [f"red y7 so below ({x})" for x in "ABC"]
    assert texts("The answer is B.") == [f"The answer is {x}" for x in "ABC"]
    assert texts("b") == ["a", "b", "c"]
    assert texts("(B) 2") == ["(A)", "(B)", "(C)"]


def test_continuations_share_what_the_reply_holds():
    assert continuations([(1, 2, 7), (1, 2, 8)], [1, 2, 7, 4]) == Continuations(
        ids=((1, 2, 7), (1, 2, 8)), shared=2
    )
    # merged letter, other tokenisation, nothing generated
    assert continuations([(1, 21), (1, 22)], [1, 21]).shared == 1
    assert continuations([(9, 21), (9, 22)], [1, 21]).shared == 0
    assert continuations([(1, 2), (1, 3)], []).shared == 0
    # what follows the letter in all options alike is dropped
    assert continuations([(1, 2, 5), (1, 3, 5)], [1, 2, 5]).ids == ((1, 2), (1, 3))
    assert continuations([(1, 2, 2), (1, 2)], [1]).ids == ((1, 2, 2), (1, 2))
    assert continuations([(1, 2), (1, 2, 3)], [1, 2, 3]).shared == 1, "one token is left to score"


def test_only_full_attention_layers_share_a_prefix(tiny_vlm):
    from transformers import DynamicCache, MistralConfig

    assert not can_share_prefix(None)
    sliding = DynamicCache(config=MistralConfig(sliding_window=8, num_hidden_layers=2))
    assert not can_share_prefix(sliding)


def test_options_of_any_length_and_number(tiny_vlm):
    """Options that differ in more than their last token take several forwards of one cache."""
    answerer, questions = ask(tiny_vlm, False, max_new_tokens=5)
    batch = answerer._collate([question.encoded for question in questions])
    sequences, cache = answerer._generate(batch)
    start = batch["input_ids"].shape[1]
    _, two, three = sequences[:, start:].tolist()
    options = [
        Continuations(ids=((5, 6), (7,), (8, 9, 10)), shared=0),
        Continuations(ids=((*two[:3], 5), (*two[:3], 6, 7)), shared=3),
        Continuations(ids=((*three, 5), (*three, 6), (*three, 6, 7)), shared=5),
    ]
    mask = batch["attention_mask"]
    cached = score_with_cache(answerer.model, cache, sequences, mask, options)
    again = score_with_cache(answerer.model, cache, sequences, mask, options)
    encoded = [question.encoded for question in questions]
    plain = score_plainly(answerer.model, answerer._collate, encoded, options)
    for row, repeated, wanted in zip(cached, again, plain, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
        assert repeated == row, "the cache is left as it was found"
