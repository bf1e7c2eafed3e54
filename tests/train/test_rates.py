"""Do rates by layer follow their table, and is every mistake in them one sentence?"""

from pathlib import Path

import pytest

from train.freeze import PARTS
from train.rates import (
    Change,
    PartRates,
    check_steps,
    parse_changes,
    parse_trainable,
    part_rates,
)
from train.recipe import load_recipe, parse_recipe
from vlm.errors import UserError
from vlm.yaml_values import parse_value, to_text

# depth of 0 (embeddings), 1 to 4 (layers), 5 (what comes after them) -> rate, of a rate of 1
TABLE = [
    ({}, [1, 1, 1, 1, 1, 1]),
    ({"layer_decay": 0.5}, [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
    ({"layers": "2-"}, [None, None, None, 1, 1, 1]),
    ({"layers": "0-"}, [None, 1, 1, 1, 1, 1]),
    ({"layers": [1, 3]}, [None, None, 1, 1, None, None]),
    ({"layers": [0, 4]}, [None, 1, 1, 1, 1, None]),
    ({"layers": "3-", "layer_decay": 0.5}, [None, None, None, None, 1 / 2, 1]),
]


@pytest.mark.parametrize("fields, expected", TABLE)
def test_rates_by_depth(fields, expected):
    rates = PartRates(learning_rate=1.0, **fields)
    assert [rates.rate_at(depth, 4) for depth in range(6)] == expected


def test_layer_decay_is_beits():
    """LayerDecayValueAssigner of BEiT: values[i] = decay ** (N + 1 - i) for ids 0 to N + 1."""
    rates = PartRates(learning_rate=4e-4, layer_decay=0.65)
    beit = [0.65 ** (12 + 1 - i) for i in range(12 + 2)]
    assert [rates.rate_at(i, 12) for i in range(14)] == [4e-4 * scale for scale in beit]


@pytest.mark.parametrize("layers", ["4-", [2, 5], [4, 6]])
def test_a_range_beyond_the_model_says_how_many_layers_there_are(layers):
    with pytest.raises(UserError, match="4 layers are counted from 0 to 3"):
        PartRates(learning_rate=1.0, layers=layers).rate_at(0, 4)


def test_a_rate_alone_is_a_part_with_that_rate():
    rates = PartRates(learning_rate=2e-5, layers="1-")
    assert part_rates(1e-3) == PartRates(learning_rate=1e-3)
    assert part_rates(rates) is rates


MISTAKES = [
    ({"languge_model": {"learning_rate": 1e-3}}, ["did you mean 'language_model'"]),
    ({"connector": {"learning_rate": 1e-3, "layers": "1-"}}, ["not for connector"]),
    ({"language_model": {"rate": 1e-3}}, ["x.language_model has no field 'rate'"]),
    ({"language_model": {"layers": "1-"}}, ["needs the field 'learning_rate'"]),
    ({"language_model": {"learning_rate": 0}}, ["learning_rate must be a learning rate"]),
    ({"language_model": {"learning_rate": "fast"}}, ["'learning_rate' must be float"]),
    ({"language_model": {"learning_rate": 1, "layers": "-8"}}, ["must be a range", "'-8'"]),
    ({"language_model": {"learning_rate": 1, "layers": [3]}}, ["must be a range", "[3]"]),
    ({"language_model": {"learning_rate": 1, "layers": [3, 3]}}, ["must be a range"]),
    ({"language_model": {"learning_rate": 1, "layers": 3}}, ["'layers' must be"]),
    ({"language_model": {"learning_rate": 1, "layer_decay": 1.1}}, ["layer_decay", "1.1"]),
    ({"language_model": {"learning_rate": 1, "layer_decay": 0}}, ["layer_decay", "not 0"]),
    ({"language_model": {"learning_rate": 1, "weight_decay": -1}}, ["weight_decay", "not -1"]),
    ({}, ["names no part"]),
    ([1], ["must be a mapping"]),
]


@pytest.mark.parametrize("value, words", MISTAKES)
def test_mistake_in_trainable(value, words):
    with pytest.raises(UserError) as error:
        parse_trainable(value, "x", PARTS)
    assert str(error.value).startswith("x") and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


CHANGES = [
    ("soon", ["must be a list such as"]),
    ([3], ["x[0] must be a mapping"]),
    ([{"at_step": 3}], ["x[0] needs the field 'trainable'"]),
    ([{"at_step": 0, "trainable": {"connector": 1}}], ["x[0].at_step must be 1 or more, not 0"]),
    ([{"at_step": 3, "trainable": {"conector": 1}}], ["x[0].trainable", "'connector'"]),
    (
        [{"at_step": n, "trainable": {"connector": 1}} for n in (5, 5)],
        ["x[1].at_step must be 6 or more, not 5"],
    ),
]


@pytest.mark.parametrize("value, words", CHANGES)
def test_mistake_in_changes(value, words):
    with pytest.raises(UserError) as error:
        parse_changes(value, "x", PARTS)
    assert all(word in str(error.value) for word in words)


def test_a_change_that_is_never_reached():
    changes = [Change(at_step=6, trainable={"connector": 1e-3})]
    check_steps(changes, 7, "here")
    with pytest.raises(UserError, match="at_step 6 is never reached, the stage has 6 steps"):
        check_steps(changes, 6, "here")


@pytest.fixture
def changing(tree):
    stage = tree["stages"][1]
    stage["trainable"]["language_model"] = {"learning_rate": 5e-4, "layers": "1-"}
    stage["changes"] = [{"at_step": 4, "trainable": {"connector": 1e-4, "vision_tower": 1e-6}}]
    stage["ema"] = {"decay": 0.9}
    return tree


def test_rates_changes_and_ema_read_back_as_themselves(changing, write_recipe):
    recipe = parse_recipe(changing, "here")
    printed = parse_value(to_text(recipe.to_dict()), "printed")
    assert parse_recipe(printed, "printed") == recipe
    stage = recipe.stage("instruct")
    assert stage.trainable["connector"] == 1e-3
    assert stage.trainable["language_model"] == PartRates(learning_rate=5e-4, layers="1-")
    assert stage.ever_trained == ["connector", "language_model", "vision_tower"]
    assert stage.ema.use == "average"
    words = ["--stages.instruct.trainable.language_model.layer_decay", "0.9"]
    again = load_recipe(write_recipe(changing), words).stage("instruct")
    assert again.trainable["language_model"].layer_decay == 0.9


ENGINES = {
    "--stages.instruct.training.deepspeed zero.json": ["changes needs all weights in one place"],
    "--stages.instruct.training.fsdp full_shard": ["training.fsdp", "make it two stages"],
    "--stages.instruct.training.lr_scheduler_type greedy": ["changes sets the peaks", "'greedy'"],
    "--stages.instruct.ema.decay 1": ["ema.decay must be in [0, 1), not 1"],
    "--stages.instruct.ema.decy 0.9": ["did you mean 'decay'"],
    "--stages.instruct.ema.use both": ["'use' must be one of 'average', 'trained'"],
}


@pytest.mark.parametrize("words", ENGINES)
def test_what_cannot_go_together(words, changing, write_recipe):
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(changing), words.split())
    assert all(part in str(error.value) for part in ENGINES[words])
    assert not Path(changing["output_dir"]).exists()
