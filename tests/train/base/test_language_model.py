"""Does the base language model read what it should, and can anybody load the result?"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from data_recipes.scenes.questions import Question
from train.base.corpus import KINDS, Document, comparisons, differences, documents, split_reply
from train.base.language_model import (
    IGNORE,
    BagLlama,
    LanguageModelSettings,
    TextBatches,
    pack,
    start_by_matching,
    train_language_model,
    write,
)
from train.base.tokenizer import END, answer_words, train_tokenizer
from vlm.errors import UserError
from vlm.packed_attention import use_packed_attention

SETTINGS = LanguageModelSettings(
    steps=2,
    batch_size=4,
    learning_rate=1e-3,
    llama={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    shares=dict.fromkeys(KINDS, 1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(f"{d.prompt}{d.text}" for d in documents(0, 500, 0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("lm")
    return out, train_language_model(SETTINGS, out)


def test_words_that_carry_the_answer_are_tokens_of_their_own(tokenizer):
    texts = " ".join(f"{d.prompt} {d.text}" for d in documents(0, 300, 0))
    for word in set(answer_words()) & set(re.findall(r"\w+", texts)):
        assert len(tokenizer(f" {word} ,", add_special_tokens=False)["input_ids"]) == 2, word


@pytest.mark.parametrize("text", ["Où est le chat ? 猫\n\t🙂", "(A) 17 balls", " x9 y10"])
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_question_of_cv_bench_is_cut_into_few_tokens(tokenizer):
    found = next(d for d in documents(1, 20, 8) if d.task == "Relation")
    assert len(tokenizer(found.prompt)["input_ids"]) < 0.15 * len(found.prompt)


@pytest.mark.parametrize(
    ("task", "reasoning", "seen"),
    [
        ("Relation", "red x2 , blue x6 , so left", ["see red x2 , blue x6 ,"]),
        (
            "Distance",
            "red x1 red y2 , blue x2 dx1 blue y4 dy2 d5 cone , green x3 dx2 green y2 dy0 d2 cube , "
            "so green d2 cube",
            ["see red x1 red y2 ,", " blue x2", " blue y4", " green x3", " green y2"],
        ),
    ],
)
def test_what_is_seen_is_not_learnt_where_no_scene_is_told(task, reasoning, seen):
    question = Question(task, "", ("a", "b"), 0, reasoning)
    pieces = split_reply(question)
    assert [text for text, learnt in pieces if not learnt] == seen
    assert "".join(text for text, _ in pieces) == question.reply


def test_differences_follow_from_the_positions_before_them():
    found = [d for d in documents(3, 40, 8) if d.kind == "Distance told"]
    assert found
    for document in found:
        axes = dict(re.findall(r"red ([xyz])(\d)", document.text))
        steps = re.findall(r"(?:blue|green) ([xyz])(\d) d([xyz])(\d)", document.text)
        assert len(steps) == 6
        for axis, place, same, step in steps:
            assert axis == same
            assert abs(int(place) - int(axes[axis])) == int(step)


def test_documents_come_in_both_kinds_and_told_scenes_hold_the_answer():
    found = list(documents(3, 40, 8))
    assert {d.kind for d in found} == set(KINDS)
    for document in found:
        if document.kind == "Relation told":
            seen = document.text.split()  # see red x2 , blue x6 , so left (A)
            for box, place in ((seen[1], seen[2]), (seen[4], seen[5])):
                (cell,) = [cell for cell in document.cells if box in cell]
                assert place in cell


def test_the_smaller_distance_is_the_conclusion():
    for seed in range(20):
        document = comparisons(np.random.default_rng(seed))
        for (given, _), (conclusion, learnt) in zip(
            document.reply[::2], document.reply[1::2], strict=True
        ):
            assert learnt
            blue, green = (int(number) for number in re.findall(r"d(\d)", given))
            color, smaller = ("blue", blue) if blue < green else ("green", green)
            assert conclusion.startswith(f" {color} d{smaller} ")
            assert conclusion[:-2] in given


def test_differences_are_those_from_the_red_box():
    for seed in range(20):
        document = differences(np.random.default_rng(seed))
        red = dict(re.findall(r"red ([xyz])(\d)", document.text))
        told = re.findall(r"(?:blue|green) ([xyz])(\d) d([xyz])(\d)", document.text)
        assert len(told) == 12 and set(red) == set("xyz")
        for axis, value, same_axis, difference in told:
            assert axis == same_axis and int(difference) == abs(int(value) - int(red[axis]))
        assert all(learnt == text.startswith(" d") for text, learnt in document.reply)


def test_only_what_is_learnt_has_labels(tokenizer):
    data = TextBatches(tokenizer, SETTINGS)
    pieces = (("see ball y2 x1 ,", False), (" so 1 (A)", True))
    document = Document("Count", "How many?", pieces, [["ball", "x1"]])
    bags, labels = data.encode(document)
    learnt = [bag[0] for bag, label in zip(bags, labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(learnt) == f" so 1 (A){END}"
    (cell,) = [bag for bag in bags if len(bag) > 1]
    assert tokenizer.convert_ids_to_tokens(cell) == ["Ġball", "Ġx1"]


def test_batches_depend_on_seed_and_index_alone(tokenizer):
    data = TextBatches(tokenizer, SETTINGS)
    again = TextBatches(tokenizer, SETTINGS)
    data[0]
    assert torch.equal(data[1]["bags"], again[1]["bags"])
    assert data.documents(0) != data.documents(1)


def test_small_shares_leave_no_batch_empty(tokenizer):
    shares = {**dict.fromkeys(KINDS, 0.0), "Count": 0.05}
    data = TextBatches(tokenizer, replace(SETTINGS, shares=shares, batch_size=1))
    assert {document.kind for index in range(5) for document in data.documents(index)} == {"Count"}
    with pytest.raises(UserError, match="shares: all are 0"):
        replace(SETTINGS, shares=dict.fromkeys(KINDS, 0.0))


def test_bags_of_one_are_plain_text(tokenizer, trained):
    model = BagLlama.from_pretrained(trained[0]).eval()
    ids = torch.tensor([tokenizer("How many balls are in the image?")["input_ids"]]) % 300
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
        assert torch.allclose(model.hidden(ids[..., None], positions), expected, atol=1e-6)


def test_packed_documents_do_not_see_each_other(trained):
    model = BagLlama.from_pretrained(trained[0]).eval()
    use_packed_attention(model.model)
    row = ([[5], [6, 7], [8], [9]], [IGNORE, IGNORE, 8, 9])
    others = ([[4]] * 9, [IGNORE] * 9)
    with torch.no_grad():
        alone, together = (model(**pack(rows))["loss"] for rows in ([row], [others, row, others]))
    assert torch.allclose(alone, together, atol=1e-6)


def test_what_the_model_writes_is_judged_not_what_it_is_given(trained):
    model = BagLlama.from_pretrained(trained[0]).eval()
    bags, labels = [[5], [6], [8], [9], [7]], [IGNORE, IGNORE, 8, IGNORE, 7]
    (written,) = write(model, [(bags, labels)])

    first = next_word(model, torch.tensor([[5, 6]]))
    second = next_word(model, torch.tensor([[5, 6, first, 9]]))
    assert written == [first, second]


def next_word(model, ids):
    """The likeliest word after some, (1, L)."""
    with torch.no_grad():
        hidden = model.hidden(ids[..., None], torch.arange(ids.shape[1])[None])
        return int(model.lm_head(hidden)[0, -1].argmax())


def test_many_words_are_written_as_one_after_the_other():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, initializer_range=0.5, **SETTINGS.llama)
    model = BagLlama(config).eval()
    use_packed_attention(model.model)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 17, 9):
        ids = torch.randint(40, (length,), generator=generator).tolist()
        rows.append(([[i] for i in ids], [IGNORE, IGNORE, *ids[2:-1], IGNORE]))
    rows.insert(1, ([[3], [4]], [IGNORE, IGNORE]))
    written = write(model, rows)
    assert written != [[i for i in labels if i != IGNORE] for _, labels in rows]
    for (bags, labels), words in zip(rows, written, strict=True):
        ids = torch.tensor([[bag[0] for bag in bags]])
        for i, label in enumerate(labels):
            if label != IGNORE:
                ids[0, i] = next_word(model, ids[:, :i])
        assert ids[0][[label != IGNORE for label in labels]].tolist() == words


def test_attention_starts_by_looking_for_its_own_words():
    torch.manual_seed(0)
    model = BagLlama(LlamaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1,
                                 intermediate_size=64, num_attention_heads=1,
                                 initializer_range=0.06, attn_implementation="eager"))  # fmt: skip
    start_by_matching(model)
    ids = torch.tensor([[3, 7, 9, 11, 13, 7]])  # the last word stands at place 1 as well
    weights = model.model(input_ids=ids, output_attentions=True).attentions[0][0, 0, -1, :5]
    assert weights.argmax() == 1


def test_the_folder_is_a_plain_llama_with_its_tokenizer(trained):
    out, report = trained
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.eos_token == END
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many balls are in the image?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    assert model.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
    assert set(report["held_out"]) <= set(KINDS)


def test_a_finished_model_is_kept_and_other_settings_are_refused(trained):
    out, report = trained
    assert train_language_model(SETTINGS, out) == report
    with pytest.raises(UserError, match="other settings"):
        train_language_model(LanguageModelSettings(**{**vars(SETTINGS), "seed": 5}), out)
