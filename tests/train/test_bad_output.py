"""Does a run keep its hands off what another run, another recipe or a full disk put in its way?"""

import json
import multiprocessing
import shutil
import time

import pytest
import yaml

from train.checkpoints import is_full_disk, seal
from train.folders import output_of, stage_tree
from train.manifest import hash_manifest
from train.recipe import parse_recipe
from train.resume import check_resume
from vlm.cli import main
from vlm.errors import UserError
from vlm.yaml_values import to_text

FORK = multiprocessing.get_context("fork")


def hold(recipe, held):
    """Hold the run's folder; so does a loader worker's stand-in, which outlives a kill."""
    with output_of(recipe):
        FORK.Process(target=time.sleep, args=(2,)).start()
        held.set()
        time.sleep(600)


def test_two_runs_in_one_folder(tree, write_recipe, tmp_path, capsys):
    recipe, held = parse_recipe(tree, "test"), FORK.Event()
    other = FORK.Process(target=hold, args=(recipe, held))
    other.start()
    try:
        assert held.wait(60)
        assert main(["train", str(write_recipe(tree))]) == 2
        told = f"another run (process {other.pid} on "
        assert told in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock", "recipe.yaml"]
    finally:
        other.kill()
        other.join()
    with output_of(recipe):  # a kill frees it at once
        pass


@pytest.fixture
def cut(tree, write_recipe, tmp_path):
    """(recipe, folder) of a stage that was killed after a checkpoint of its step 1."""
    del tree["stages"][1]
    tree["stages"][0]["training"] |= {"max_steps": 2, "save_steps": 1}
    recipe, folder = str(write_recipe(tree)), tmp_path / "run" / "align"
    assert main(["train", recipe]) == 0
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    return recipe, folder


def test_what_a_stage_does_not_go_on_from(cut, data_file, capsys):
    recipe, folder = cut
    before = (folder / "training_log.jsonl").read_bytes()

    def refused(*words):
        assert main(["train", recipe, *words]) == 2
        assert (folder / "training_log.jsonl").read_bytes() == before
        return capsys.readouterr().err

    # another recipe
    error = refused("--stages.align.trainable.connector", "2e-3")
    assert "holds stage 'align' with stage.trainable.connector = 0.001, but now it is" in error
    # other data under the same name
    text = data_file.read_text()
    data_file.write_text(text.replace("thing 1", "thing 7"))
    error = refused()
    assert "data source 'main' of stage 'align' has changed since the stage began" in error
    data_file.write_text(text)
    # another run's checkpoint, or no stage's
    written = folder / "checkpoints" / "checkpoint-1" / "recipe.yaml"
    own = written.read_text()
    other = yaml.safe_load(own)
    other["model"]["connector"]["depth"] = 3
    written.write_text(yaml.safe_dump(other))
    seal(written.parent)
    error = refused()
    assert "another run, with model.connector.depth = 3, but here it is 2: take it out" in error
    written.unlink()
    seal(written.parent)
    assert "holds no recipe.yaml, so no stage of ours wrote it" in refused()
    # all as it was, in settings that do not reach the weights as well
    written.write_text(own)
    seal(written.parent)
    assert main(["train", recipe, "--stages.align.training.logging_steps", "2"]) == 0
    assert "going on from" in capsys.readouterr().out


def test_a_stage_before_that_was_trained_anew(tree, tmp_path):
    recipe = parse_recipe(tree, "test")
    folder, previous = tmp_path / "run" / "instruct", tmp_path / "run" / "align"
    checkpoint = folder / "checkpoints" / "checkpoint-1"
    for each in (previous, checkpoint):
        each.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(to_text(stage_tree(recipe, recipe.stages[1])))
    (previous / "manifest.json").write_text(json.dumps({"status": "done", "seconds": 3.1}))
    manifest = {"previous": hash_manifest(previous)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    given = (recipe, recipe.stages[1], folder, checkpoint, previous)
    check_resume(*given)
    (previous / "manifest.json").write_text(json.dumps({"status": "done", "seconds": 3.2}))
    with pytest.raises(UserError, match="stage 'instruct' began from another training of"):
        check_resume(*given)


# What torch 2.13 and safetensors 0.8 raised on a full tmpfs.
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_known_by_its_errors(error):
    assert is_full_disk(error)
    assert not is_full_disk(RuntimeError("shapes do not match"))


def test_a_full_disk_at_the_end_loses_nothing(cut, monkeypatch, capsys):
    recipe, _ = cut

    def fill_up(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("train.loop._write_final", fill_up)
        assert main(["train", recipe]) == 2
    error = capsys.readouterr().err
    assert "for the stage's model; " in error and "checkpoint-2 is whole: make room" in error
    assert main(["train", recipe]) == 0
