"""Does a killed run give the same losses and the same weights, to the bit, as one left alone?"""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from train.callbacks import read_log
from train.checkpoints import newest, step_of
from vlm.cli import main


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_log(folder / "training_log.jsonl")]


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def long_tree(tree, tmp_path, make_language_model):
    """Dropout in the language model, workers, accumulation, several epochs: all must come back."""
    folder = tmp_path / "dropout"
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    make_language_model(attention_dropout=0.1, **sizes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tree["model"]["language_model"]) / name, folder)
    tree["model"]["language_model"] = str(folder)
    del tree["stages"][0]
    tree["stages"][0]["training"] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 22,
        "save_steps": 5,
        "logging_steps": 3,
        "weight_decay": 0.1,
        "dataloader_num_workers": 1,
    }
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in full", "adapter", "adapter on nf4"])
def test_killed_run_equals_one_left_alone(
    long_tree, write_recipe, tmp_path, capsys, kill_when, kind
):
    if kind == "adapter on nf4":
        pytest.importorskip("bitsandbytes")
        long_tree["model"]["quantization"] = "nf4"
    if kind != "in full":
        long_tree["stages"][0]["adapter"] = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
    recipe = write_recipe(long_tree)
    whole, cut = tmp_path / "whole" / "instruct", tmp_path / "cut" / "instruct"
    assert main(["train", str(recipe), "--output_dir", str(whole.parent)]) == 0

    words = [str(recipe), "--output_dir", str(cut.parent)]
    kill_when(words, lambda: any(step >= 8 for step, _ in losses(cut)))
    assert newest(cut / "checkpoints") is not None
    assert read_manifest(cut)["status"] == "running"
    assert main(["train", *words]) == 0

    assert "going on from" in capsys.readouterr().out
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) > 8
    name = "model.safetensors" if kind == "in full" else "adapter_model.safetensors"
    weights = [(run / name).read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]
    manifests = [read_manifest(run) for run in (cut, whole)]
    expected = {"main": {"seen": 88, "skipped": 0}}
    assert [manifest["records"] for manifest in manifests] == [expected, expected]


def test_ctrl_c_saves_and_says_how_to_go_on(long_tree, write_recipe, tmp_path, capsys, shown):
    long_tree["stages"][0]["training"] |= {"max_steps": 100_000, "dataloader_num_workers": 0}
    recipe, folder = write_recipe(long_tree), tmp_path / "run" / "instruct"
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell runs the tests with &

    def press_when_running():
        while len(losses(folder)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_when_running, daemon=True)
    thread.start()
    assert main(["train", str(recipe)]) == 130
    thread.join()
    found, checkpoint = capsys.readouterr(), newest(folder / "checkpoints")
    assert f"stopped; {checkpoint} is saved, the same command goes on" in found.out
    assert losses(folder)[-1][0] == step_of(checkpoint)
    assert read_manifest(folder)["status"] == "interrupted"
    assert (folder / "loss.png").stat().st_size > 1000
    assert signal.getsignal(signal.SIGINT) is before
