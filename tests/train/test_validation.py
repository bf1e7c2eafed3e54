"""Is the loss on held-out records right, and does measuring it leave no trace in the training?"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from data_recipes.dataset import Collator
from train.callbacks import read_log
from train.checkpoints import newest
from train.data import dataset_of
from train.recipe import parse_recipe
from train.validation import batches_of_rank
from vlm.cli import main
from vlm.loading import load_model


@pytest.mark.parametrize(
    "size, batch, world, expected",
    [
        (5, 2, 1, [[([0, 1], True), ([2, 3], True), ([4], True)]]),
        (5, 2, 2, [[([0, 1], True), ([4], True)], [([2, 3], True), ([4], False)]]),
        (1, 4, 3, [[([0], True)], [([0], False)], [([0], False)]]),
    ],
)
def test_every_record_counts_once_and_no_process_waits(size, batch, world, expected):
    assert [batches_of_rank(size, batch, rank, world) for rank in range(world)] == expected


@pytest.fixture
def measured(tree, tmp_path, make_language_model):
    """Dropout, so that a number drawn would show; validation at steps 3, 6 and 8."""
    del tree["stages"][0]
    stage = tree["stages"][0]
    stage["validation"] = {"data": stage["data"], "every": 3}
    stage["training"] |= {"save_steps": 8, "per_device_eval_batch_size": 5, "logging_steps": 2}
    folder = tmp_path / "dropout"
    make_language_model(attention_dropout=0.1).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tree["model"]["language_model"]) / name, folder)
    tree["model"]["language_model"] = str(folder)
    return tree


def log_of(recipe, folder, *words):
    assert main(["train", str(recipe), "--output_dir", str(folder), *words]) == 0
    return read_log(folder / "instruct" / "training_log.jsonl")


def test_the_loss_is_that_of_all_records_at_once(measured, write_recipe, tmp_path):
    log = log_of(write_recipe(measured), tmp_path / "a")
    steps = [line["step"] for line in log if "validation_loss" in line]
    assert steps == [3, 6, 8]
    model, processor = load_model(tmp_path / "a" / "instruct")
    stage = parse_recipe(measured, "here").stages[0]
    dataset = dataset_of(stage, stage.data, processor, 7)
    batch = Collator(processor)([dataset[p] for p in range(len(dataset))])
    del batch["skipped"], batch["record_ids"]
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert log[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert log[-1]["validation_loss"] < log[1]["validation_loss"]


def test_packed_rows_have_the_same_loss(measured, write_recipe, tmp_path):
    recipe = write_recipe(measured)
    padded = log_of(recipe, tmp_path / "a")
    packed = log_of(recipe, tmp_path / "b", "--stages.instruct.packed", "true")
    assert packed[-1]["validation_loss"] == pytest.approx(padded[-1]["validation_loss"], rel=1e-4)
    assert packed[-1]["padding_share"] == 0 < padded[-1]["padding_share"] < 1


def test_it_leaves_no_trace(measured, write_recipe, tmp_path):
    recipe = write_recipe(measured)
    log_of(recipe, tmp_path / "with")
    log_of(recipe, tmp_path / "without", "--stages.instruct.validation", "null")
    weights = [
        (tmp_path / name / "instruct" / "model.safetensors").read_bytes()
        for name in ("with", "without")
    ]
    assert weights[0] == weights[1]


@pytest.fixture
def held_out(measured, tmp_path, make_image):
    """The stage's records and what a test adds: a reply that is too long, a picture cut short."""
    rows = json.loads((tmp_path / "data.json").read_text())[:6]
    path = tmp_path / "held_out.json"
    make_image(64, 64).save(tmp_path / "cut.jpg")  # whose header tells nothing of its end
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    source = {"name": "held", "path": str(path)}
    measured["stages"][0]["validation"]["data"] = {"sources": [source], "on_error": "skip"}
    turns = rows[0]["conversations"]
    reply = {"from": "gpt", "value": "b" * 3000}
    odd = {
        "long": {**rows[0], "id": "long", "conversations": [turns[0], reply]},
        "cut": {**rows[0], "id": "cut", "image": "cut.jpg"},
    }

    def write(*names, keep=6):
        path.write_text(json.dumps([*rows[:keep], *(odd[name] for name in names)]))

    return write


def test_records_that_cannot_be_used_are_told_and_not_counted(
    measured, held_out, write_recipe, tmp_path, capsys
):
    held_out("long", "cut")
    recipe = write_recipe(measured)
    log = log_of(recipe, tmp_path / "a")
    told = capsys.readouterr().out
    assert told.count("validation: 2 record(s) cannot be used and are left out, such as") == 1
    held_out()
    assert log_of(recipe, tmp_path / "b")[-1]["validation_loss"] == pytest.approx(
        log[-1]["validation_loss"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("names", "keep", "on_error", "message"),
    [
        (["long"], 6, "raise", r"validation: .*\(id 'long'\).*the conversation takes 3"),
        (["long"], 0, "skip", "validation: no record can be used; the first: .*takes 3"),
        (["cut"], 0, "skip", "validation: no record can be used; `vlm data check`"),
    ],
)
def test_without_a_record_to_measure_nothing_is_told_as_a_loss(
    names, keep, on_error, message, measured, held_out, write_recipe, tmp_path, capsys
):
    held_out(*names, keep=keep)
    measured["stages"][0]["validation"]["data"]["on_error"] = on_error
    assert main(["train", str(write_recipe(measured))]) == 2
    assert re.search(message, capsys.readouterr().err)
    begun = (tmp_path / "run" / "instruct" / "training_log.jsonl").exists()
    assert begun == (names == ["cut"]), "what headers tell is told before the first step"


def test_a_fault_that_shows_late_costs_no_step_and_can_be_mended(
    measured, held_out, write_recipe, tmp_path, capsys
):
    held_out("cut")
    measured["stages"][0]["validation"]["data"]["on_error"] = "raise"
    recipe, folder = write_recipe(measured), tmp_path / "run" / "instruct"
    assert main(["train", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "(id 'cut')" in told and "mend it, and the same command goes on" in told
    assert newest(folder / "checkpoints").name == "checkpoint-3"
    held_out()
    assert main(["train", str(recipe)]) == 0
    assert "its data has changed, losses from here on are of other records" in (
        capsys.readouterr().out
    )
    log = read_log(folder / "training_log.jsonl")
    assert [line["step"] for line in log if "validation_loss" in line] == [6, 8]
    log_of(recipe, tmp_path / "other", "--stages.instruct.validation", "null")
    weights = [
        run / "instruct" / "model.safetensors" for run in (folder.parent, tmp_path / "other")
    ]
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_validation_may_change_within_a_stage(measured, held_out, write_recipe, capsys):
    held_out("cut")
    measured["stages"][0]["validation"]["data"]["on_error"] = "raise"
    recipe = str(write_recipe(measured))
    assert main(["train", recipe]) == 2
    assert main(["train", recipe, "--stages.instruct.validation.data.on_error", "skip"]) == 0
    assert main(["train", recipe, "--stages.instruct.max_length", "900"]) == 2
    assert "stage.max_length" in capsys.readouterr().err


MISTAKES = {
    "--stages.instruct.validation.every 0": ["validation.every must be 1 or more, not 0"],
    "--stages.instruct.validation.evry 3": ["did you mean 'every'"],
    "--stages.instruct.validation.data.sources.main.path gone.json": [
        "stages.instruct.validation.data",
        "gone.json",
    ],
    "--stages.instruct.validation.data.on_error ignore": ["'on_error' must be one of"],
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_before_training(words, measured, write_recipe, capsys):
    measured["stages"][0]["validation"]["data"] = {
        "sources": [dict(measured["stages"][0]["data"]["sources"][0])]
    }
    assert main(["train", str(write_recipe(measured)), *words.split()]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in MISTAKES[words])
