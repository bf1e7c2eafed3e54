"""Does an ablation check first, run each variant once, go on where it stopped, and drop no row?"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import vlm.child_commands
from eval.ablation import checks, execution, flow, gather
from eval.ablation.cli import add_arguments
from eval.ablation.cli import run as run_command
from eval.runner import choose_indices
from eval.tasks.cv_bench import CvBench
from vlm.child_commands import Ended, only_one
from vlm.errors import UserError
from vlm.yaml_values import read_file, to_text

COSTS = {
    "visual_tokens": 16.0, "parameters_connector": 1000, "parameters": 5000, "look_ms": 1.0,
    "flops_connector": 10, "flops_language_model": 20, "prefill_ms": 2.0, "prefill_peak_mb": 3.0,
    "flops_encoder": 30, "look_ms_low": 0.9, "look_ms_high": 1.1, "prefill_ms_low": 1.9,
    "prefill_ms_high": 2.2, "in_turns": True,
}  # fmt: skip


@pytest.fixture
def base(encoder_folder, language_model_folder):
    """A resolved recipe as `vlm train --check` prints it."""
    return {
        "name": "tiny",
        "output_dir": "runs/tiny",
        "model": {
            "vision_encoder": {"type": "transformers", "source": str(encoder_folder)},
            "connector": {"type": "mlp", "depth": 2},
            "language_model": str(language_model_folder),
            "tiling": {"type": "resize"},
            "checkpoint": None,
            "dtype": "float32",
        },
        "stages": [{"name": "align", "length_window": 0}, {"name": "instruct", "length_window": 1}],
        "seed": 5,
        "num_threads": 1,
        "feature_cache": {"folder": None, "mode": "auto", "max_gb": 50.0, "runs": 1},
    }


def costs_of(task, indices, done, *_):
    return {run.row.name: dict(COSTS) for run in done}


class Fake:
    """Commands that leave the files of `vlm train` and `vlm eval`, at once."""

    def __init__(self, data):
        self.ran, self.checked, self.failing, self.killed = [], [], {}, None
        self.task = CvBench.open([data])

    def __call__(self, commands, lock, log, watch):
        (words,) = commands
        name = Path(words[1]).parts[-3 if words[0] == "train" else -4]
        self.ran.append(f"{words[0]} {name}")
        if self.killed == self.ran[-1]:
            raise KeyboardInterrupt
        if self.ran[-1] in self.failing:
            log.write_text(f"step 1\rstep 2\n{self.failing[self.ran[-1]]}\n")
            return Ended(1.0, 50, [(0, 2)])
        if words[0] == "train":
            recipe = read_file(Path(words[1]))
            manifest = {"status": "done", "seconds": 3.0, "peak_memory_mb": {"host": 9.0}}
            for stage in recipe["stages"]:
                path = Path(recipe["output_dir"]) / stage["name"] / "manifest.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(manifest | {"data": {"main": "same"}}))
                (path.parent / "model.safetensors").touch()
                (path.parent / "checkpoints/checkpoint-1").mkdir(parents=True)
        else:
            self.answer(Path(words[words.index("--out") + 1]), better=name != "mlp")
        return Ended(2.0, 100, [])

    def answer(self, folder, better):
        rows = [{"identity": {"weights": "x"}}]
        for index in choose_indices(self.task, None):
            example = self.task.get_example(index)
            letter = example.answer if better or index % 2 else "Z"
            rows.append({"index": index, "view": "image", "likelihood": letter})
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "samples.jsonl").write_text(text)
        headline = {"name": "mean", "accuracy": 0.5, "low": 0.4, "high": 0.6}
        (folder / "results.json").write_text(json.dumps({"headline": headline}))


@pytest.fixture
def data(tmp_path, write_benchmark):
    return write_benchmark(tmp_path / "test.parquet", per_task=12)


@pytest.fixture
def fake(monkeypatch, base, data):
    made = Fake(data)
    monkeypatch.setattr(execution, "run_side_by_side", made)

    def check_recipe(path, overrides):  # as `vlm train --check`, which starts slowly
        if path != "recipe.yaml":
            made.checked.append(read_file(Path(path)))
            if made.checked[-1]["stages"][0].get("max_steps") == 0:
                raise UserError(f"recipe {path}: stages.align: max_steps must be above 0")
        return json.loads(json.dumps(base))

    monkeypatch.setattr(flow, "check_recipe", check_recipe)
    monkeypatch.setattr(checks, "check_recipe", check_recipe)
    monkeypatch.setattr(flow, "measured_costs", costs_of)
    monkeypatch.setattr(flow, "draw", lambda report, path: not path.touch())
    return made


@pytest.fixture
def ablate(tmp_path, data):
    def call(*words):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        fixed = ["recipe.yaml", "--data", str(data), "--out", str(tmp_path / "out")]
        args, args.overrides = parser.parse_known_args([*fixed, *words])
        return run_command(args)

    return call


def report(tmp_path):
    return json.loads((tmp_path / "out/ablation.json").read_text())


def test_rows_are_trained_scored_and_compared(tmp_path, fake, ablate, capsys):
    assert ablate("--vary", "connector=mlp,pooling") == 0
    assert fake.ran == ["train mlp", "eval mlp", "train pooling", "eval pooling"]
    recipe = read_file(tmp_path / "out/runs/pooling/seed5/recipe.yaml")
    assert recipe["model"]["connector"] == {"type": "pooling"} and recipe["seed"] == 5
    assert not list(tmp_path.glob("out/runs/*/*/train/*/checkpoints"))
    rows = report(tmp_path)["rows"]
    assert rows["mlp"]["scores"]["Depth"]["accuracy"] == 0.5
    assert rows["pooling"]["scores"]["Depth"]["difference"]["value"] == 0.5
    table = (tmp_path / "out/table.md").read_text()
    printed = capsys.readouterr().out
    assert table in printed and "[2/2] pooling, seed 5: mean 50.0 [40.0, 60.0]" in printed
    assert "| pooling | 100.0 [" in table and "chance 50.0" in table
    head, mlp, pooling = (tmp_path / "out/table.csv").read_text().splitlines()
    assert len(head.split(",")) == len(mlp.split(",")) == len(pooling.split(","))


def test_the_same_call_does_nothing_twice_and_more_rows_and_seeds_are_added(tmp_path, fake, ablate):
    ablate("--vary", "connector=mlp,pooling")
    ablate("--vary", "connector=mlp,pooling")
    assert len(fake.ran) == 4
    ablate("--vary", "connector=mlp,pooling,linear", "--seeds", "6")
    assert fake.ran.count("train linear") == 6 and fake.ran.count("train mlp") == 6
    ablate("--vary", "connector=mlp,linear")
    assert "The folder also holds pooling" in (tmp_path / "out/table.md").read_text()


def test_a_stopped_ablation_goes_on(fake, ablate):
    fake.killed = "eval mlp"
    with pytest.raises(KeyboardInterrupt):
        ablate("--vary", "connector=mlp,pooling")
    fake.killed = None
    assert ablate("--vary", "connector=mlp,pooling") == 0
    assert fake.ran == ["train mlp", "eval mlp", "eval mlp", "train pooling", "eval pooling"]


def test_a_failed_row_is_told_in_the_table_and_the_others_go_on(tmp_path, fake, ablate):
    fake.failing = {"train pooling": "vlm train: the loss became nan at step 3"}
    assert ablate("--vary", "connector=mlp,pooling,linear") == 1
    rows = report(tmp_path)["rows"]
    assert rows["pooling"]["failed"] == {"5": "training: vlm train: the loss became nan at step 3"}
    assert rows["linear"]["scores"]
    table = (tmp_path / "out/table.md").read_text()
    assert "| pooling | failed |" in table and "the loss became nan" in table
    fake.failing = {}
    assert ablate("--vary", "connector=mlp,pooling,linear") == 0  # tried again
    assert fake.ran.count("train pooling") == 2


def test_other_questions_are_asked_without_training_again(fake, ablate):
    ablate("--vary", "connector=mlp,pooling")
    ablate("--vary", "connector=mlp,pooling", "--max-new-tokens", "9")
    assert fake.ran[4:] == ["eval mlp", "eval pooling"]


def test_runs_with_one_encoder_share_its_features(tmp_path, fake, ablate, base):
    source = base["model"]["vision_encoder"]["source"]
    encoders = f"encoder={{source: {source}}},{{type: patches, patch_size: 8, image_size: 32}}"
    ablate("--vary", "connector=mlp,linear,kan", "--vary", encoders, "--seeds", "2")
    files = list(tmp_path.glob("out/runs/*/seed*/recipe.yaml"))
    caches = [read_file(path)["feature_cache"] for path in files]
    assert len(caches) == 12 and {cache["runs"] for cache in caches} == {6}
    assert {cache["folder"] for cache in caches} == {str(tmp_path / "out/features")}


def test_another_tiling_is_another_reader(tmp_path, fake, ablate):
    tilings = "model.tiling.type=resize,pad"
    ablate("--vary", "connector=mlp,linear", "--vary", tilings, "--seeds", "3")
    files = list(tmp_path.glob("out/runs/*/seed*/recipe.yaml"))
    assert len(files) == 12
    assert {read_file(path)["feature_cache"]["runs"] for path in files} == {6}


def test_a_cache_named_by_the_recipe_and_none_are_left_alone(tmp_path, fake, ablate, base):
    ablate("--vary", "connector=mlp,linear", "--no-feature-cache")
    recipe = tmp_path / "out/runs/linear/seed5/recipe.yaml"
    assert read_file(recipe)["feature_cache"] == base["feature_cache"]
    base["feature_cache"]["folder"] = "elsewhere"
    ablate("--vary", "connector=linear,kan")  # and is no other setting: linear is kept
    recipe = tmp_path / "out/runs/kan/seed5/recipe.yaml"
    assert read_file(recipe)["feature_cache"] == base["feature_cache"]
    assert fake.ran.count("train linear") == 1


def test_dry_run_tells_and_runs_nothing(tmp_path, fake, ablate, capsys):
    assert ablate("--vary", "connector=mlp,pooling", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "pooling" in out and "tokens/view" in out
    assert not fake.ran and not (tmp_path / "out").exists()


def test_answers_to_other_questions_are_not_compared(tmp_path, fake, ablate):
    ablate("--vary", "connector=mlp,pooling")
    path = tmp_path / "out/runs/pooling/seed5/eval/samples.jsonl"
    head, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({"identity": {"weights": "y", "parser": 0}}) + "\n" + rest)
    with pytest.raises(UserError, match=r"were not asked alike \(parser differ"):
        ablate("--vary", "connector=mlp,pooling")
    assert "parser" not in head


def test_other_bytes_under_the_same_name_are_another_start(fake, ablate, base, tmp_path):
    source = tmp_path / "encoder"
    shutil.copytree(base["model"]["vision_encoder"]["source"], source)
    base["model"]["vision_encoder"]["source"] = str(source)
    ablate("--vary", "connector=mlp,pooling")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"start.*safetensors"):
        ablate("--vary", "connector=mlp,pooling")


def test_costs_are_kept_until_the_rows_change(tmp_path, fake, ablate, monkeypatch):
    measured = []

    def measure(models, *_):
        measured.append(list(models))
        return {name: dict(COSTS) for name in models}

    monkeypatch.setattr(flow, "measured_costs", gather.measured_costs)
    monkeypatch.setattr(gather, "measure", measure)
    ablate("--vary", "connector=mlp,pooling")
    ablate("--vary", "connector=mlp,pooling")
    ablate("--vary", "connector=mlp,linear,pooling")
    assert measured == [["mlp", "pooling"], ["mlp", "linear", "pooling"]]


def test_changed_settings_in_the_same_folder_are_refused(fake, ablate, base):
    ablate("--vary", "connector=mlp,pooling")
    base["stages"][0]["length_window"] = 1
    with pytest.raises(UserError, match=r"stages\.0\.length_window = 0, but now it is 1"):
        ablate("--vary", "connector=mlp,pooling")


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ("connector=mlp,poling", "did you mean 'pooling'"),
        ("connector=mlp,{type: mlp, dept: 2}", "dept"),
        ("connector=mlp,{type: pixel_shuffle, factor: 3}", "row 'pixel_shuffle"),
        ("connector=mlp,minigemini", "needs two feature maps"),
        ("encoder=no-such-preset", "no-such-preset"),
        ("model.language_model=/nowhere/gone", "gone cannot be read"),
    ],
)
def test_what_cannot_be_trained_is_told_before_the_first_training(fake, ablate, vary, sentence):
    with pytest.raises(UserError, match=sentence):
        ablate("--vary", vary)
    assert not fake.ran


def test_rows_that_change_other_fields_are_checked_by_vlm_train(fake, ablate):
    with pytest.raises(UserError, match=r"row 'max_steps=0': stages.align: max_steps must be"):
        ablate("--vary", "stages.align.max_steps=3,0")
    assert [tree["stages"][0]["max_steps"] for tree in fake.checked] == [3, 0] and not fake.ran


def test_videos_are_varied_on_a_checkpoint(fake, ablate, base, make_model, tmp_path, capsys):
    model, processor = make_model()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "image_model")
    base["model"] |= {"checkpoint": str(tmp_path / "image_model"), "video": {"frames": 4}}
    base["model"] |= dict.fromkeys(("vision_encoder", "connector", "language_model", "tiling"))
    vary = ["--vary", "model.video.frames=2,4", "--vary", "model.video.pool=max,average"]
    assert ablate(*vary, "--dry-run") == 0
    assert "frames=2, pool=max" in (told := capsys.readouterr().out) and "  16 " in told
    assert ablate(*vary) == 0
    assert [line for line in fake.ran if line.startswith("train")] == [
        f"train frames={frames}-pool={pool}" for frames in (2, 4) for pool in ("max", "average")
    ]
    with pytest.raises(UserError, match=r"parts cannot be varied \(model\.connector\)"):
        ablate("--vary", "connector=mlp,linear")


def test_an_order_that_depends_on_the_tokens_is_refused(fake, ablate, base):
    base["stages"][0]["length_window"] = 4
    with pytest.raises(UserError, match="length_window is 4"):
        ablate("--vary", "connector=mlp,pooling")
    base["stages"][0] |= {"length_window": 0, "packed": {"length": 512, "window": 1024}}
    with pytest.raises(UserError, match="packed fills rows to a length"):
        ablate("--vary", "connector=mlp,pooling")


def test_two_at_once_and_foreign_folders_are_refused(tmp_path, fake, ablate):
    (tmp_path / "out").mkdir()
    with only_one(tmp_path / "out", "an ablation"), pytest.raises(UserError, match="at work"):
        ablate("--vary", "connector=mlp,pooling")
    foreign = tmp_path / "out/runs/mlp/seed5"
    foreign.mkdir(parents=True)
    (foreign / "thing").touch()
    with pytest.raises(UserError, match="was not written by an ablation"):
        ablate("--vary", "connector=mlp,pooling")


@pytest.fixture
def real_recipe(encoder_folder, language_model_folder, make_image):
    """(folder) -> a recipe of one stage with four records in the folder."""

    def write(folder):
        rows = []
        for number in range(4):
            make_image(seed=number).save(folder / f"{number}.png")
            turns = [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"thing {number}"},
            ]
            rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
        (folder / "data.json").write_text(json.dumps(rows))
        training = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1}
        return {
            "name": "tiny",
            "output_dir": "unused",
            "seed": 3,
            "num_threads": 1,
            "model": {
                "vision_encoder": {"type": "transformers", "source": str(encoder_folder)},
                "connector": {"type": "linear"},
                "language_model": str(language_model_folder),
                "chat_template": "chatml",
            },
            "stages": [
                {
                    "name": "align",
                    "trainable": {"connector": 1e-3},
                    "data": {"sources": [{"name": "main", "path": str(folder / "data.json")}]},
                    "training": training,
                }
            ],
        }

    return write


def test_a_killed_ablation_of_real_commands_goes_on_to_the_table(
    tmp_path, data, real_recipe, forked, monkeypatch
):
    """Trains, kills, trains on, scores and measures two connectors with the real commands."""
    monkeypatch.setattr(vlm.child_commands, "subprocess", forked)
    monkeypatch.setattr(checks, "subprocess", forked)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_text(real_recipe(tmp_path)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vlm", "ablate", str(recipe), "--data", str(data), "--out",
               str(out), "--vary", "connector=mlp,{type: pooling, side: 2}", "--rounds", "2",
               "--max-new-tokens", "4", "--limit", "8"]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        first = forked.Popen(command, log, log, start_new_session=True)
    deadline = time.monotonic() + 600
    while not (out / "runs/mlp/seed3/train/align/manifest.json").exists():
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = forked.run(command)
    assert second.returncode == 0, second.stderr[-3000:]
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert [rows[name]["costs"]["visual_tokens"] for name in rows] == [16, 4]
    assert rows["pooling(side=2)"]["scores"]["Depth"]["difference"]["p"] <= 1
    assert (out / "plot.png").exists() and (out / "table.csv").exists()
    third = forked.run(command)
    assert third.stdout.count("done before") == 2
