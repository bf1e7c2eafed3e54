"""Does a step learn the same however its records are cut into micro-batches, rows and ranks?"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from train.callbacks import read_log
from vlm.cli import main

SIZE = "--stages.instruct.training.per_device_train_batch_size"


def train_on_two(*words):
    """Run `python -m train` in two processes by torchrun itself; `on_ranks` is faster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(port), "-m", "train", *words]
    result = subprocess.run(
        torchrun,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def losses(folder):
    return [line["loss"] for line in read_log(folder / "instruct" / "training_log.jsonl")]


@pytest.fixture
def one_stage(tree):
    del tree["stages"][0]
    tree["stages"][0]["training"]["use_cpu"] = True
    return tree


@pytest.mark.slow
def test_two_ranks_equal_one(one_stage, write_recipe, tmp_path):
    recipe = str(write_recipe(one_stage))
    assert main(["train", recipe, SIZE, "4", "--output_dir", str(tmp_path / "one")]) == 0
    train_on_two(recipe, SIZE, "2", "--output_dir", str(tmp_path / "two"))
    assert len(losses(tmp_path / "one")) == 8
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.fixture
def sgd_step(one_stage):
    """One step of plain SGD at rate 1: what the weights change by is the gradient."""
    stage = one_stage["stages"][0]
    stage["trainable"] = {"connector": 1.0, "language_model": 1.0}
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    stage["training"] |= {**plain, "max_steps": 1}
    return one_stage


def weights(folder):
    tensors = load_file(folder / "instruct" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def words_of(folder, size, steps, *words):
    accumulation = "--stages.instruct.training.gradient_accumulation_steps"
    return [SIZE, str(size), accumulation, str(steps), "--output_dir", str(folder), *words]


@pytest.mark.parametrize("loss_weight", ["token", "square"])
def test_micro_batches_and_accumulation_give_one_gradient(
    loss_weight, sgd_step, write_recipe, tmp_path
):
    sgd_step["stages"][0]["loss_weight"] = loss_weight
    recipe = str(write_recipe(sgd_step))
    found = []
    for size, steps, packed in ((1, 8, "false"), (2, 4, "false"), (8, 1, "false"), (4, 2, "true")):
        folder = tmp_path / f"{size}x{steps}"
        words = words_of(folder, size, steps, "--stages.instruct.packed", packed)
        assert main(["train", recipe, *words]) == 0
        found.append(weights(folder))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    other = tmp_path / "other"
    words = words_of(other, 8, 1, "--stages.instruct.loss_weight", "sample")
    assert main(["train", recipe, *words]) == 0
    assert (weights(other) - found[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_two_ranks_give_the_same_gradient(sgd_step, write_recipe, tmp_path, on_ranks):
    sgd_step["stages"][0]["loss_weight"] = "square"
    recipe = str(write_recipe(sgd_step))
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", recipe, *words_of(one, 8, 1)]) == 0
    on_ranks([recipe, *words_of(two, 2, 2)])
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_filled_rows_on_two_ranks_and_a_resume_in_the_second_epoch(
    one_stage, write_recipe, tmp_path, on_ranks
):
    stage = one_stage["stages"][0]
    stage |= {"packed": {"length": 160, "window": 10}, "loss_weight": "square"}
    stage["training"] |= {"max_steps": 12, "save_steps": 4, "save_total_limit": 5}
    recipe = str(write_recipe(one_stage))
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    assert main(["train", recipe, SIZE, "2", "--output_dir", str(one)]) == 0
    on_ranks([recipe, SIZE, "1", "--output_dir", str(two)])
    assert len(losses(one)) == 12
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)

    shutil.copytree(two, cut)
    manifest = json.loads((cut / "instruct" / "manifest.json").read_text())
    (cut / "instruct" / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    shutil.rmtree(cut / "instruct" / "checkpoints" / "checkpoint-12")
    on_ranks([recipe, SIZE, "1", "--output_dir", str(cut)])
    assert losses(cut) == losses(two)
    assert torch.equal(weights(cut), weights(two))
    records = [json.loads((run / "instruct" / "manifest.json").read_text()) for run in (one, cut)]
    assert records[0]["records"] == records[1]["records"]


@pytest.mark.slow
def test_two_ranks_over_a_change_and_with_records_held_out(
    one_stage, write_recipe, tmp_path, on_ranks
):
    """24 records held out in batches of 5: of two ranks one has a batch less."""
    stage = one_stage["stages"][0]
    stage["changes"] = [{"at_step": 4, "trainable": {"connector": 1e-3, "vision_tower": 1e-3}}]
    stage["validation"] = {"data": stage["data"], "every": 3}
    stage["ema"] = {"decay": 0.9}
    stage["training"]["per_device_eval_batch_size"] = 5
    recipe, one, two = str(write_recipe(one_stage)), tmp_path / "one", tmp_path / "two"
    assert main(["train", recipe, SIZE, "4", "--output_dir", str(one)]) == 0
    on_ranks([recipe, SIZE, "2", "--output_dir", str(two)])
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    logs = [read_log(run / "instruct" / "training_log.jsonl") for run in (one, two)]
    found = [[line["validation_loss"] for line in log if "validation_loss" in line] for log in logs]
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], abs=1e-4)
