"""Do DeepSpeed and FSDP2 learn what one process learns, and is it really they who run?"""

import json
import shutil

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import AutoModelForImageTextToText

from train.callbacks import read_log
from train.engine import LEVELS
from vlm.cli import main

STAGES = ("align", "instruct")


def losses(folder, stage):
    return [line["loss"] for line in read_log(folder / stage / "training_log.jsonl")]


def engine(folder, stage):
    return json.loads((folder / stage / "manifest.json").read_text())["engine"]


def words_for(recipe, folder, size, **training):
    """Return what `vlm train` is told: the same in both stages."""
    training = {"per_device_train_batch_size": size, **training}
    pairs = [(f"--stages.{s}.training.{k}", str(v)) for s in STAGES for k, v in training.items()]
    return [recipe, "--output_dir", str(folder), *(word for pair in pairs for word in pair)]


@pytest.fixture
def recipe(tree, write_recipe):
    for stage in tree["stages"]:
        stage["training"] |= {"max_steps": 4, "save_steps": 3}
        if torch.accelerator.is_available():
            stage["training"]["use_cpu"] = True
    return str(write_recipe(tree))


def check_same(folder, one, name):
    """Check engine, losses and the written model of a run on two ranks against one process's."""
    for stage in STAGES:
        assert engine(folder, stage)["name"] == name
        assert losses(folder, stage) == pytest.approx(losses(one, stage), abs=1e-4)
    model, expected = (
        AutoModelForImageTextToText.from_pretrained(f / STAGES[-1]) for f in (folder, one)
    )
    torch.testing.assert_close(
        dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=1e-4
    )


def cut_short(folder, name):
    """Return a copy of a run whose last stage was killed after its first checkpoint."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    note = copy / STAGES[-1] / "manifest.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "status": "running"}))
    shutil.rmtree(copy / STAGES[-1] / "checkpoints" / "checkpoint-4")
    return copy


def test_two_ranks_learn_what_one_learns_and_go_on_as_one_and_back(
    recipe, tmp_path, on_ranks, capsys
):
    one = tmp_path / "one"
    assert main(["train", *words_for(recipe, one, 4)]) == 0
    back = cut_short(one, "back")
    ways = {"DDP": {}, "FSDP2": {"fsdp": "true"}}
    jobs = [words_for(recipe, tmp_path / name, 2, **how) for name, how in ways.items()]
    on_ranks(*jobs, words_for(recipe, back, 2))
    assert engine(back, STAGES[-1])["name"] == "DDP"
    assert losses(back, STAGES[-1]) == pytest.approx(losses(one, STAGES[-1]), abs=1e-4)
    for name, how in ways.items():
        check_same(tmp_path / name, one, name)
        alone = cut_short(tmp_path / name, f"{name} alone")
        if name == "DDP":
            assert main(["train", *words_for(recipe, alone, 2)]) == 2
            assert "with 4 records a step, but now it would be 2" in capsys.readouterr().err
            assert main(["train", *words_for(recipe, alone, 4)]) == 0
        else:
            on_ranks(words_for(recipe, alone, 4, **how), ranks=1)
        assert losses(alone, STAGES[-1]) == pytest.approx(losses(one, STAGES[-1]), abs=1e-4)


@pytest.mark.slow
def test_deepspeed_on_two_ranks_learns_what_one_learns(recipe, tmp_path, on_ranks, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    assert main(["train", *words_for(recipe, tmp_path / "one", 4)]) == 0
    jobs = [words_for(recipe, tmp_path / level, 2, deepspeed=level) for level in LEVELS]
    on_ranks(*jobs, timeout=400)
    again = [cut_short(tmp_path / level, f"{level} again") for level in ("zero2", "zero3")]
    jobs = [words_for(recipe, f, 2, deepspeed=f.name.split()[0]) for f in again]
    on_ranks(*jobs, timeout=200)
    for folder in again:
        expected = losses(tmp_path / "one", STAGES[-1])
        assert losses(folder, STAGES[-1]) == pytest.approx(expected, abs=1e-4)
    alone = cut_short(tmp_path / "zero2", "alone")
    with pytest.raises(ProcessRaisedException, match="AssertionError"):
        on_ranks(words_for(recipe, alone, 4, deepspeed="zero2"), ranks=1)
    for level in LEVELS:
        name, _, host = level.replace("zero", "ZeRO-").partition("_")
        check_same(tmp_path / level, tmp_path / "one", name)
        assert bool(engine(tmp_path / level, "align")["offload"]) == bool(host)
    assert torch.accelerator.is_available() or not (tmp_path / "compiled").exists()
