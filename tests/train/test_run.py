"""Do two stages run from components to a model that loads, and are done stages kept?"""

import errno
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_recipes.dataset import ConversationDataset
from train.callbacks import read_log
from vlm.cli import main
from vlm.loading import load_model
from vlm.modeling import VlmForConditionalGeneration


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed_parts(before, after):
    return {
        ".".join(name.split(".")[:2])
        for name in before
        if not torch.equal(before[name], after[name])
    }


def test_two_stages(tree, write_recipe, tmp_path, capsys, shown):
    run_folder = tmp_path / "run"
    align, instruct = run_folder / "align", run_folder / "instruct"
    assert main(["train", str(write_recipe(tree))]) == 0
    told = capsys.readouterr().out
    assert "vision_tower          0.015 M parameters  frozen" in told
    assert "connector             0.002 M parameters  trains at 0.001" in told

    # the first stage moved the connector alone, the second the language model too
    assert changed_parts(weights(align), weights(instruct)) == {
        "model.connector",
        "model.language_model",
        "lm_head.weight",
    }
    model, processor = load_model(instruct)
    assert type(model).__name__ == "VlmForConditionalGeneration"

    # each stage is a plain checkpoint with its own chat template, and no pickle
    assert "<|im_start|>" not in (align / "chat_template.jinja").read_text()
    assert "<|im_start|>" in processor.chat_template
    assert not list(run_folder.glob("*/*.bin"))

    # what was run is written down
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    assert recipe["stages"][0]["data"]["sources"][0]["repeat"] == 1.0
    manifest = json.loads((instruct / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["records"] == {"main": {"seen": 32, "skipped": 0}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["data"]["main"]["sha256"]) == 64
    assert manifest["seconds"] > 0
    assert manifest["peak_memory_mb"]["host"] > 10

    # logs for people and for programs
    log = read_log(instruct / "training_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert {"learning_rate/connector", "learning_rate/language_model"} <= set(log[0])
    assert log[0]["learning_rate/connector"] == pytest.approx(
        2 * log[0]["learning_rate/language_model"]
    )
    assert all(line["supervised_tokens_per_second"] > 0 and line["mfu"] > 0 for line in log)
    assert (instruct / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((instruct / "tensorboard").glob("events*"))
    assert [path.name for path in sorted((instruct / "checkpoints").iterdir())] == [
        "checkpoint-6",
        "checkpoint-8",
    ]

    # a second run finds all of it done
    before = (instruct / "model.safetensors").stat().st_mtime_ns
    assert main(["train", str(write_recipe(tree))]) == 0
    assert "done before, kept" in capsys.readouterr().out
    assert (instruct / "model.safetensors").stat().st_mtime_ns == before

    # and other settings do not overwrite it
    words = ["--stages.instruct.trainable.connector", "2e-3"]
    assert main(["train", str(write_recipe(tree)), *words]) == 2
    error = capsys.readouterr().err
    assert "stage.trainable.connector = 0.001" in error
    assert "0.002" in error
    assert main(["train", str(write_recipe(tree)), "--stages.align.training.save_steps", "3"]) == 0


def test_stage_alone_needs_the_one_before(tree, write_recipe, tmp_path, capsys):
    recipe = str(write_recipe(tree))
    assert main(["train", recipe, "--stage", "instruct"]) == 2
    assert "not done; run without --stage, or first with --stage align" in capsys.readouterr().err
    assert main(["train", recipe, "--stage", "align"]) == 0
    assert not (tmp_path / "run" / "instruct").exists()
    assert main(["train", recipe, "--stage", "instruct"]) == 0
    assert (tmp_path / "run" / "instruct" / "model.safetensors").exists()


def test_seed_decides_the_result(tree, write_recipe, tmp_path):
    del tree["stages"][1]
    recipe = str(write_recipe(tree))
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["train", recipe, "--output_dir", str(tmp_path / name), "--seed", seed]) == 0
    first, second, third = (weights(tmp_path / name / "align") for name in "abc")
    assert changed_parts(first, second) == set()
    assert "model.connector" in changed_parts(first, third)


def test_from_a_checkpoint_of_ours(tree, write_recipe, model_folder, tmp_path):
    del tree["stages"][0]
    tree["model"] = {"checkpoint": str(model_folder)}
    tree["stages"][0]["trainable"] = {"vision_tower": 1e-4}
    assert main(["train", str(write_recipe(tree))]) == 0
    after = weights(tmp_path / "run" / "instruct")
    assert changed_parts(weights(model_folder), after) == {"model.vision_tower"}


def test_accumulation_equals_a_larger_batch(tree, write_recipe, tmp_path):
    """Rows differ in supervised tokens, so a mean of means would differ."""
    del tree["stages"][0]
    recipe = str(write_recipe(tree))
    settings = {"whole": (6, 1), "parts": (2, 3)}
    for name, (batch, steps) in settings.items():
        where = "--stages.instruct.training."
        words = [f"{where}per_device_train_batch_size", str(batch)]
        words += [f"{where}gradient_accumulation_steps", str(steps)]
        assert main(["train", recipe, *words, "--output_dir", str(tmp_path / name)]) == 0
    logs = [read_log(tmp_path / name / "instruct" / "training_log.jsonl") for name in settings]
    found = [[line["loss"] for line in log] for log in logs]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_skipped_records_are_counted_not_replaced(tree, write_recipe, tmp_path, data_file, capfd):
    (data_file.parent / "2.png").unlink()  # 5 of 24 records
    stage = tree["stages"][0]
    stage["training"] = {"per_device_train_batch_size": 2, "num_train_epochs": 2}
    stage["training"] |= {"logging_steps": 1, "save_steps": 5}
    recipe = str(write_recipe(tree))
    assert main(["train", recipe, "--stage", "align"]) == 2
    assert "2.png" in capfd.readouterr().err

    words = ["--stages.align.data.on_error", "skip", "--output_dir", str(tmp_path / "skip")]
    assert main(["train", recipe, "--stage", "align", *words]) == 0
    folder = tmp_path / "skip" / "align"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["records"] == {"main": {"seen": 48, "skipped": 10}}
    notes = [json.loads(line) for line in (folder / "skipped.0.jsonl").read_text().splitlines()]
    assert len(notes) == 10
    assert all("2.png" in note["reason"] for note in notes)
    assert capfd.readouterr().err.count("skipped: ") == 10


def test_stage_that_skips_all_its_records_stops(tree, write_recipe, tmp_path, capsys):
    words = ["--stage", "align", "--stages.align.max_length", "3"]
    words += ["--stages.align.data.on_error", "skip"]
    assert main(["train", str(write_recipe(tree)), *words]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]  # the progress line has ended before it
    assert sentence.startswith("vlm train: none of the first 6 steps has a record to learn from")
    assert not (tmp_path / "run/align/model.safetensors").exists()


def test_loss_that_is_no_number_stops_before_the_weights(tree, write_recipe, tmp_path, capsys):
    words = ["--stages.align.trainable.connector", "1e30", "--stage", "align"]
    assert main(["train", str(write_recipe(tree)), *words]) == 2
    error = capsys.readouterr().err
    assert "the loss became nan at step" in error
    assert "records r" in error
    for checkpoint in (tmp_path / "run/align/checkpoints").glob("*"):
        assert all(torch.isfinite(value).all() for value in weights(checkpoint).values())
    assert not (tmp_path / "run/align/model.safetensors").exists()


def test_output_folder_that_cannot_be_written(tree, write_recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    recipe = str(write_recipe(tree))
    assert main(["train", recipe, "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["train", recipe, "--output_dir", "/proc/run"]) == 2
    assert "/proc/run cannot be written" in capsys.readouterr().err


def test_folder_of_somebody_else(tree, write_recipe, tmp_path, capsys):
    (tmp_path / "run" / "align").mkdir(parents=True)
    (tmp_path / "run" / "align" / "thesis.tex").write_text("x")
    assert main(["train", str(write_recipe(tree))]) == 2
    assert "exists and is no stage of a run" in capsys.readouterr().err


def test_no_space_is_told_before_training(tree, write_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "train.folders.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    assert main(["train", str(write_recipe(tree))]) == 2
    error = capsys.readouterr().err
    assert "0.00 GB of free space" in error
    assert not (tmp_path / "run/align/checkpoints").exists()


def test_disk_full_while_training_loses_nothing(tree, write_recipe, tmp_path, capsys, monkeypatch):
    recipe, folder = str(write_recipe(tree)), tmp_path / "run" / "align"
    write, calls = VlmForConditionalGeneration.save_pretrained, []

    def fill_up(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(VlmForConditionalGeneration, "save_pretrained", fill_up)
    assert main(["train", recipe, "--stage", "align"]) == 2
    error = capsys.readouterr().err
    assert "no space left" in error
    assert "checkpoint-4 is whole" in error
    assert main(["train", recipe, "--stage", "align"]) == 0
    assert "going on from" in capsys.readouterr().out
    assert [line["step"] for line in read_log(folder / "training_log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_positions_go_on_through_epochs_and_a_resume(tree, write_recipe, tmp_path, monkeypatch):
    """Two and a half epochs of 24 records: every position once, in order, also after a resume."""
    tree["stages"][0]["training"] |= {"max_steps": 15, "save_steps": 8, "save_total_limit": 9}
    asked, get = [], ConversationDataset.__getitem__

    def remember(self, position):
        asked.append(position)
        return get(self, position)

    monkeypatch.setattr(ConversationDataset, "__getitem__", remember)
    recipe, folder = str(write_recipe(tree)), tmp_path / "run" / "align"
    assert main(["train", recipe, "--stage", "align"]) == 0
    assert asked[:60] == list(range(60))
    assert set(asked[60:]) <= set(range(60, 72))  # the loader looks one batch ahead
    asked.clear()
    (folder / "manifest.json").unlink()
    (folder / "checkpoints" / "checkpoint-15" / "complete.json").unlink()
    assert main(["train", recipe, "--stage", "align"]) == 0
    assert asked[:28] == list(range(32, 60))


def test_killed_after_the_last_step(tree, write_recipe, tmp_path, capsys):
    tree["stages"][0]["training"]["max_steps"] = 5  # inside an epoch
    recipe, folder = str(write_recipe(tree)), tmp_path / "run" / "align"
    assert main(["train", recipe, "--stage", "align"]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    manifest = json.loads(before["manifest.json"])
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (folder / "model.safetensors").write_bytes(before["model.safetensors"][:100])
    assert main(["train", recipe, "--stage", "align"]) == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(after) == set(before)
    for name in ("model.safetensors", "training_log.jsonl", "chat_template.jinja"):
        assert after[name] == before[name]
    assert json.loads(after["manifest.json"])["records"] == manifest["records"]


def test_stages_may_differ_in_precision(tree, write_recipe, tmp_path):
    tree["stages"][0]["training"]["bf16"] = True
    assert main(["train", str(write_recipe(tree))]) == 0
    assert weights(tmp_path / "run" / "instruct")["lm_head.weight"].dtype == torch.float32


def test_what_a_cpu_cannot_do_is_refused_and_a_long_warm_up_told(tree, write_recipe, capsys):
    recipe, train = str(write_recipe(tree)), "--stages.align.training"
    words = [f"{train}.fp16", "true", f"{train}.use_cpu", "true"]
    assert main(["train", recipe, *words]) == 2
    assert "stages.align.training.fp16 has no effect on a CPU; take bf16" in capsys.readouterr().err
    words = ["--stage", "align", f"{train}.max_steps", "1", f"{train}.warmup_steps", "2"]
    assert main(["train", recipe, *words]) == 0
    assert "warming up takes 2 steps and there are 1" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_compile_changes_no_step(tree, write_recipe, tmp_path):
    # Its default backend, inductor, takes minutes to compile here, and gave these losses too.
    del tree["stages"][1]
    tree["stages"][0]["training"] |= {"max_steps": 1, "save_strategy": "no"}
    recipe, losses = str(write_recipe(tree)), []
    compiled = ["--stages.align.training.torch_compile", "true"]
    compiled += ["--stages.align.training.torch_compile_backend", "eager"]
    for name, words in (("plain", []), ("compiled", compiled)):
        assert main(["train", recipe, "--output_dir", str(tmp_path / name), *words]) == 0
        losses.append(read_log(tmp_path / name / "align/training_log.jsonl")[0]["loss"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    plain, other = (weights(tmp_path / name / "align") for name in ("plain", "compiled"))
    assert plain.keys() == other.keys()
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-6)
