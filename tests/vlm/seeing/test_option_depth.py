"""Are options found, and is the last layer's score what the harness scores?"""

from functools import partial

import pytest
import torch

from vlm.errors import UserError
from vlm.option_scores import Continuations, score_plainly
from vlm.seeing.option_depth import option_depth, question_options, score_by_layer


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Where? Select from the following choices.\n(A) left\n(B) right", ("left", "right")),
        ("Which? A. a dog\nB. a cat\nC. neither", ("a dog", "a cat", "neither")),
        ("How many?\nA) 3\nB) 2", ("3", "2")),
        ("Where is it? (A) left of it, (B) right of it", ("left of it", "right of it")),
        ("Is (A) larger than B?", ()),
        ("What is in the picture?", ()),
        ("A. a dog", ()),
        ("(B) right\n(C) left", ()),
    ],
)
def test_options_of_a_question(question, wanted):
    assert question_options(question) == wanted


ASKED = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "Where?\n(A) left\n(B) right\n(C) up"}],
}


def replied(text):
    return [ASKED, {"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_last_line_is_the_score_of_the_harness(make_model, make_image, kind):
    model, processor = make_model(kind=kind)
    encoded = processor.encode([ASKED], [make_image()], add_generation_prompt=True)
    options = Continuations(ids=((40, 5, 6), (40, 7), (40, 5, 9)), shared=1)
    made = score_by_layer(model, processor, encoded, options)
    collate = partial(processor.collate, padding_side="left")
    wanted = score_plainly(model, collate, [encoded], [options])
    assert made.shape == (3, 3), "the embedding and two layers; three options"
    assert made[-1].tolist() == pytest.approx(wanted[0], abs=1e-4)
    assert not torch.allclose(made[0], made[-1], atol=1e-2)


@torch.no_grad()
def test_a_line_is_the_norm_and_the_head_on_that_layer(make_model, make_image):
    model, processor = make_model()
    made = option_depth(model, processor, [ASKED], [make_image()])
    tokens = processor.tokenizer("(A", add_special_tokens=False)["input_ids"]
    encoded = processor.encode([ASKED], [make_image()], add_generation_prompt=True)
    ids = torch.cat([encoded["input_ids"], torch.tensor(tokens)])
    batch = processor.collate(
        [{**encoded, "input_ids": ids, "attention_mask": torch.ones_like(ids)}], "left"
    )
    hidden = model(**batch, output_hidden_states=True).hidden_states[1][0, -3:-1]
    logits = model.lm_head(model.model.language_model.norm(hidden)).log_softmax(-1)
    wanted = float(logits[0, tokens[0]] + logits[1, tokens[1]])
    assert float(made.log_likelihoods[1, 0]) == pytest.approx(wanted, abs=1e-4)
    assert made.among_options().sum(-1).tolist() == pytest.approx([1.0] * 3)
    assert made.texts == ("left", "right", "up") and made.chosen is None and made.before == ""


def test_the_reasoning_before_the_letter_counts(make_model, make_image):
    model, processor = make_model()
    images = [make_image()]
    bare = option_depth(model, processor, [ASKED], images)
    said = option_depth(model, processor, replied("It is high up, so (C)"), images)
    assert said.chosen == 2 and said.before == "It is high up, so ("
    assert not torch.allclose(said.among_options()[-1], bare.among_options()[-1], atol=1e-4)
    unread = option_depth(model, processor, replied("I cannot tell."), images)
    assert unread.chosen is None and unread.before == "I cannot tell."


def test_recurrent_language_models_have_layers_too(make_with, make_image):
    model, processor = make_with("mamba2")
    made = option_depth(model, processor, [ASKED], [make_image()])
    assert made.log_likelihoods.shape == (3, 3)


def test_a_question_without_options_is_told(make_model, make_image):
    model, processor = make_model()
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    with pytest.raises(UserError, match="no options"):
        option_depth(model, processor, [question], [make_image()])
