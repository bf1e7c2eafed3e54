"""Does a Q-Former's first stage that was killed end as one left alone, and are two ranks as one?"""

import pytest
import torch
from safetensors.torch import load_file

from data_recipes.mixture import Mixture, parse_sources
from train.callbacks import read_log
from vlm.cli import main

# of the machine, not of the run
MEASURED = ("per_second", "data_wait_share", "mfu", "peak_memory_gb")


def log_of(folder):
    """Return the log without what was measured of the machine."""
    lines = read_log(folder / "training_log.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in lines]


@pytest.mark.slow
def test_killed_run_equals_one_left_alone(first_stage, write_recipe, tmp_path, capsys, kill_when):
    """With dropout, a worker, accumulation, several epochs and a tokenizer of the captions."""
    first_stage["model"]["connector"]["dropout"] = 0.1
    first_stage["stages"][0]["training"] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 16,
        "save_steps": 4,
        "logging_steps": 3,
        "weight_decay": 0.1,
        "dataloader_num_workers": 1,
    }
    recipe = write_recipe(first_stage)
    whole, cut = tmp_path / "whole" / "represent", tmp_path / "cut" / "represent"
    assert main(["train", str(recipe), "--output_dir", str(whole.parent)]) == 0
    words = [str(recipe), "--output_dir", str(cut.parent)]
    kill_when(words, lambda: any(line["step"] >= 6 for line in log_of(cut)))
    assert main(["train", *words]) == 0
    assert "going on from" in capsys.readouterr().out
    assert log_of(cut) == log_of(whole)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_equal_one(first_stage, write_recipe, tmp_path, on_ranks):
    """Contrast, drawn negatives and captions: two ranks of 4 pairs are one of 8, step for step.

    The second rank has no pair in the first step and one pair less in the second; captions differ
    in length, so that ranks pad differently. Plain gradient descent: Adam's first steps are as
    long for a gradient that is nothing but rounding.
    """
    stage = first_stage["stages"][0]
    stage["training"] |= {"use_cpu": True, "optim": "sgd", "max_grad_norm": 0.0}
    stage["trainable"]["connector"] = 0.05
    stage["data"]["on_error"] = "skip"
    (source,) = parse_sources(stage["data"]["sources"], "test")
    recipe = str(write_recipe(first_stage))
    size = "--stages.represent.training.per_device_train_batch_size"
    order = Mixture([source], [24], seed=0)
    for position in (4, 5, 6, 7, 12):
        (tmp_path / f"{order.locate(position)[1]}.png").unlink()
    assert main(["train", recipe, size, "8", "--output_dir", str(tmp_path / "one")]) == 0
    on_ranks([recipe, size, "4", "--output_dir", str(tmp_path / "two")])
    logs = [log_of(tmp_path / name / "represent") for name in ("one", "two")]
    assert len(logs[0]) == 6
    for one, two in zip(*logs, strict=True):
        assert one.pop("padding_share") >= two.pop("padding_share")  # each rank pads its own rows
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert logs[0][-1]["loss"] < logs[0][0]["loss"] - 0.1
    found = [load_file(tmp_path / n / "represent" / "model.safetensors") for n in ("one", "two")]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)
