"""Does a stage learn the same from stored features, without looking at a picture again?"""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import data_recipes.dataset
import data_recipes.pictures
import train.features.cache
import train.features.plan
from data_recipes.feature_writer import NoRoomError
from train.arguments import training_arguments
from train.callbacks import read_log
from train.features.cache import prepare_features
from train.features.work import SAMPLE
from train.freeze import freeze
from train.parts import stage_parts
from train.recipe import load_recipe
from vlm.cli import main
from vlm.errors import UserError


def losses(folder):
    return [line["loss"] for line in read_log(folder / "training_log.jsonl")]


def note(folder):
    return json.loads((folder / "manifest.json").read_text())["feature_cache"]


@pytest.fixture
def run(tree, write_recipe, tmp_path, capsys):
    """(name, *words, mode, folder, code) -> the run's output folder and what it printed."""

    for stage in tree["stages"]:
        stage["training"]["save_strategy"] = "no"

    def start(name, *words, mode="always", folder="features", code=0):
        options = ["--output_dir", str(tmp_path / name), *words]
        if folder is not None:
            options += ["--feature_cache.folder", str(tmp_path / folder)]
            options += ["--feature_cache.mode", mode]
        assert main(["train", str(write_recipe(tree)), *options]) == code
        return tmp_path / name, "".join(capsys.readouterr())

    return start


@pytest.fixture
def decodes(monkeypatch):
    """Count pictures that are decoded: for the store, and elsewhere."""
    counts = {"store": 0, "elsewhere": 0}

    def counted(where, load):
        def count_and_load(*args, **options):
            counts[where] += 1
            return load(*args, **options)

        return count_and_load

    store, elsewhere = data_recipes.pictures, data_recipes.dataset
    monkeypatch.setattr(store, "load_image", counted("store", store.load_image))
    monkeypatch.setattr(elsewhere, "load_media", counted("elsewhere", elsewhere.load_media))
    return counts


def test_same_losses_and_no_picture_is_decoded_twice(run, decodes):
    computed, printed = run("computed", folder=None)
    assert "features" not in printed
    decodes.update(store=0, elsewhere=0)
    stored, printed = run("stored")
    # 4 pictures, once for both stages; besides them, each stage looks at a few records.
    assert decodes == {"store": 4, "elsewhere": decodes["elsewhere"]}
    assert decodes["elsewhere"] <= 2 * SAMPLE
    assert printed.count("features: read from") == 2
    for stage in ("align", "instruct"):
        assert losses(stored / stage) == pytest.approx(losses(computed / stage), abs=1e-6)
        assert note(computed / stage) is None
    found = [note(stored / stage) for stage in ("align", "instruct")]
    assert [each["used"] for each in found] == [True, True]
    assert [each["pictures"] for each in found] == [4, 4]
    assert [each["stored"] for each in found] == [0, 4]
    assert 20 <= found[0]["readings"] <= 24
    again, _ = run("again")
    assert decodes["store"] == 4
    assert losses(again / "align") == losses(stored / "align")


@pytest.mark.parametrize(
    "words",
    [
        ["--stages.align.training.dataloader_num_workers", "2"],
        ["--stages.align.training.bf16", "true"],
        ["--stages.align.length_window", "2"],
        ["--stages.align.packed", "true"],
        ["--stages.align.packed", "{length: 300, window: 8}"],
        ["--model.tiling.type", "anyres"],
        ["--stages.align.training.activation_checkpointing", "true"],
    ],
    ids=lambda words: words[0].rpartition(".")[2],
)
def test_same_losses_however_the_stage_runs(words, run):
    words = ["--stage", "align", "--stages.align.training.use_cpu", "true", *words]
    computed, _ = run("computed", *words, folder=None)
    stored, _ = run("stored", *words)
    assert note(stored / "align")["used"]
    assert losses(stored / "align") == pytest.approx(losses(computed / "align"), abs=1e-6)


def test_auto_stores_where_it_pays_and_says_why(run, monkeypatch):
    folder, printed = run("no", "--stage", "align", mode="auto")
    counts = r"20 readings and 3\d in later stages of 4 pictures, 0 of them stored"
    assert re.search(counts, printed), printed
    assert "features: computed, not stored: saves " in printed
    assert "worth it from 15% on" in printed
    assert note(folder / "align")["used"] is False
    monkeypatch.setattr(train.features.plan, "LEAST_SAVED", 0.05)
    folder, printed = run("yes", "--stage", "align", mode="auto")
    assert "features: read from " in printed
    assert 0.05 < note(folder / "align")["saved_share"] < 0.15


def test_other_weights_are_another_encoders(run, tree, tmp_path, decodes):
    run("first", "--stage", "align")
    changed = tmp_path / "changed"
    shutil.copytree(tree["model"]["vision_encoder"]["source"], changed)
    (weights,) = changed.glob("*.safetensors")
    tensors = load_file(weights)
    tensors[min(tensors)] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    words = ["--model.vision_encoder.source", str(changed)]
    decodes.update(store=0)
    second, _ = run("second", "--stage", "align", *words)
    assert note(second / "align")["stored"] == 0
    assert decodes["store"] == 4
    computed, _ = run("computed", "--stage", "align", *words, folder=None)
    assert losses(second / "align") == pytest.approx(losses(computed / "align"), abs=1e-6)


def test_a_changed_picture_is_encoded_again(run, make_image, tmp_path, decodes):
    run("first", "--stage", "align")
    make_image(seed=9).save(tmp_path / "0.png")
    decodes.update(store=0)
    second, _ = run("second", "--stage", "align")
    assert decodes["store"] == 1
    computed, _ = run("computed", "--stage", "align", folder=None)
    assert losses(second / "align") == pytest.approx(losses(computed / "align"), abs=1e-6)


@pytest.fixture
def prepare(tree, write_recipe, tmp_path, capsys):
    """(earlier, *words) -> what was decided for the stage align, and what was printed."""

    def start(earlier, *words):
        words = ["--feature_cache.folder", str(tmp_path / "features"), *words]
        recipe = load_recipe(write_recipe(tree), words)
        stage = recipe.stages[0]
        parts = stage_parts(recipe, stage, None, None)
        freeze(parts.model, stage.trainable)
        arguments = training_arguments(recipe, stage, tmp_path / "run")
        capsys.readouterr()
        found = prepare_features(recipe, stage, parts, arguments, earlier)
        return found, capsys.readouterr().out

    return start


ALWAYS = ("--feature_cache.mode", "always")


def test_no_room_is_told(prepare, monkeypatch):
    found, printed = prepare(None, *ALWAYS, "--feature_cache.max_gb", "0.000001")
    assert "GB to write, but max_gb 1e-06 and the disk leave" in printed
    assert (found.store, found.note["used"]) == (None, False)

    def full(*_):
        raise NoRoomError

    monkeypatch.setattr(train.features.cache, "fill", full)
    found, printed = prepare(None, *ALWAYS)
    assert "max_gb 50 or the disk left no room for the last of them" in printed
    assert (found.store, found.note["used"]) == (None, False)


def test_pictures_that_were_moved_are_stored_still(prepare, tmp_path):
    folder = prepare(None, *ALWAYS)[0].store.folder
    for path in tmp_path.glob("[0-3].png"):
        path.rename(tmp_path / "old.png")
        path.write_bytes((tmp_path / "old.png").read_bytes())
    used = sum(path.stat().st_size for path in folder.glob("*.*s"))
    found, _ = prepare(None, *ALWAYS, "--feature_cache.max_gb", f"{used / 1e9:.12f}")
    assert (found.note["stored"], found.note["bytes_to_write"]) == (4, 0)
    assert found.store is not None and len(found.store) == 4


def test_a_stage_goes_on_as_it_began(prepare):
    found, printed = prepare({"used": False}, *ALWAYS)
    assert found.store is None
    assert "not stored: the stage began without" in printed
    assert "digits" not in printed
    assert prepare(None)[0].store is None  # it does not pay
    found, _ = prepare({"used": True})
    assert found.store is not None
    assert len(found.store) == 4
    told = json.loads((found.store.folder / "features.json").read_text())
    assert told["features"]["view_size"] == 32
    assert "torch" in told["first_writer"]["versions"]
    for words in (
        ["--feature_cache.folder", "null"],
        ["--stages.align.trainable.vision_tower", "1"],
    ):
        found, printed = prepare({"used": True}, *words)
        assert found.store is None
        assert "from here on the last digits of losses may differ" in printed


def test_a_stage_that_trains_its_encoder_computes(prepare):
    found, _ = prepare(None, *ALWAYS, "--stages.align.trainable.vision_tower", "1e-5")
    assert found.note == {"used": False, "why": "the stage trains its encoder"}


def test_a_folder_that_cannot_be_made(prepare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"feature_cache\.folder .* cannot be written"):
        prepare(None, *ALWAYS, "--feature_cache.folder", str(tmp_path / "file" / "below"))


def test_what_the_loader_asks_for_ahead_is_stored_too(run, tree, make_image, tmp_path):
    path = Path(tree["stages"][0]["data"]["sources"][0]["path"])
    records = json.loads(path.read_text())[:20]
    for number, record in enumerate(records):
        record["image"] = f"own{number}.png"
        make_image(seed=number).save(tmp_path / record["image"])
    path.write_text(json.dumps(records))
    few = ["--stage", "align", "--stages.align.training.max_steps", "2"]
    alone, _ = run("alone", *few)
    assert note(alone / "align")["pictures"] == 12
    ahead, _ = run("ahead", *few, "--stages.align.training.dataloader_num_workers", "1")
    assert note(ahead / "align")["pictures"] == 20


def test_broken_pictures_are_told_as_without_a_store(run, tree, tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    messages = [
        run(str(folder), "--stage", "align", folder=folder, code=2)[1] for folder in (None, "f")
    ]
    assert all("0.png cannot be read" in text for text in messages)
    tree["stages"][0]["data"] = {**tree["stages"][0]["data"], "on_error": "skip"}
    folders = [run(f"skip{folder}", "--stage", "align", folder=folder)[0] for folder in (None, "f")]
    manifests = [json.loads((f / "align" / "manifest.json").read_text()) for f in folders]
    assert manifests[0]["records"] == manifests[1]["records"]
    assert manifests[0]["records"]["main"]["skipped"] > 0
    assert losses(folders[0] / "align") == pytest.approx(losses(folders[1] / "align"), abs=1e-6)


def test_a_misspelt_setting(tree, write_recipe, capsys):
    assert main(["train", str(write_recipe(tree)), "--feature_cache.foldr", "x"]) == 2
    assert "feature_cache has no field 'foldr' (did you mean 'folder'?)" in capsys.readouterr().err
