"""Does a run that reads stored features survive kill -9 to the bit, and agree over ranks?"""

import os

import pytest

from train.callbacks import read_log
from train.checkpoints import newest
from vlm.cli import main


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_log(folder / "training_log.jsonl")]


def words(folder, store):
    return ["--output_dir", str(folder), "--feature_cache.folder", str(store)]


@pytest.mark.slow
def test_killed_run_equals_one_left_alone(tree, write_recipe, tmp_path, capsys, kill_when):
    """Also where half of its features are lost meanwhile, and the other half was another run's."""
    del tree["stages"][0]
    tree["feature_cache"] = {"mode": "always"}
    tree["stages"][0]["training"] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 22,
        "save_steps": 5,
        "logging_steps": 3,
        "dataloader_num_workers": 1,
    }
    recipe = str(write_recipe(tree))
    whole, cut, store = tmp_path / "whole", tmp_path / "cut", tmp_path / "store"
    assert main(["train", recipe, *words(whole, tmp_path / "own")]) == 0
    run = [recipe, *words(cut, store)]
    kill_when(run, lambda: any(step >= 8 for step, _ in losses(cut / "instruct")))
    assert newest(cut / "instruct" / "checkpoints") is not None
    (features,) = store.rglob("*.features")
    os.truncate(features, features.stat().st_size // 2)

    capsys.readouterr()
    assert main(["train", *run]) == 0
    printed = capsys.readouterr().out
    assert "going on from" in printed
    assert "4 pictures, 2 of them stored" in printed
    assert losses(cut / "instruct") == losses(whole / "instruct")
    weights = [(run / "instruct" / "model.safetensors").read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_ranks_share_the_work_and_equal_one(tree, write_recipe, tmp_path, on_ranks):
    del tree["stages"][0]
    tree["feature_cache"] = {"mode": "always"}
    tree["stages"][0]["training"]["use_cpu"] = True
    recipe = str(write_recipe(tree))
    size = "--stages.instruct.training.per_device_train_batch_size"
    assert main(["train", recipe, size, "4", "--output_dir", str(tmp_path / "one")]) == 0
    on_ranks([recipe, size, "2", *words(tmp_path / "two", tmp_path / "store")])
    one, two = (losses(tmp_path / name / "instruct") for name in ("one", "two"))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)
    assert len(list((tmp_path / "store").rglob("*.features"))) == 2
