"""Are checkpoints scored at their steps, what a kill left out included, and failures only told?"""

import json
import random
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.benchmark import run_alone
from train.checkpoints import is_whole
from vlm.cli import main


@pytest.fixture(scope="module")
def questions(tmp_path_factory, make_image):
    """Nine questions in CV-Bench's columns."""
    folder = tmp_path_factory.mktemp("questions")
    make_image().save(folder / "picture.png")
    picture = {"bytes": (folder / "picture.png").read_bytes(), "path": None}
    rows = [
        {"idx": number, "type": kind, "task": task, "source": source, "image": picture,
         "question": "?", "choices": ["a", "b"], "answer": random.Random(number).choice("AB"),
         "prompt": "Which?\n(A) a\n(B) b"}
        for number, (kind, task, source) in enumerate(
            [("2D", "Relation", "COCO"), ("2D", "Count", "COCO"), ("3D", "Depth", "Omni3D")] * 3
        )
    ]  # fmt: skip
    rows = [{**row, "answer": f"({row['answer']})"} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "questions.parquet")
    return str(folder / "questions.parquet")


@pytest.fixture
def benched(tree, questions):
    """Six steps, scored at 4 and 6; checkpoints of the training's own at 3 and 6."""
    del tree["stages"][1]
    stage = tree["stages"][0]
    stage["training"] |= {"save_steps": 3, "save_total_limit": 1}
    stage["benchmark"] = {"data": [questions], "every": 4, "limit": 9}
    return tree


@pytest.fixture
def asked(monkeypatch):
    """What `vlm eval` was called with; it finds an accuracy, or ends with the code in `fails`."""
    calls, fails = [], []

    def run(command, log):
        out = Path(command[command.index("--out") + 1])
        assert is_whole(Path(command[4])) and log.parent == out
        calls.append(command[3:])
        results = {"benchmark": "cv_bench", "headline": {"accuracy": 0.5 + len(calls) / 100}}
        results["tasks"] = {"Count": {"accuracy": 0.25}}
        (out / "results.json").write_text(json.dumps(results))
        return fails[-1] if fails else 0

    monkeypatch.setattr("train.benchmark.run_alone", run)
    return calls, fails


def test_a_benchmark_is_no_part_of_the_launch(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    show = "import os, sys; print(os.environ.get('WORLD_SIZE'), 'PATH' in os.environ); sys.exit(3)"
    assert run_alone([sys.executable, "-c", show], tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "None True\n"


def lines(folder):
    return [json.loads(line) for line in (folder / "benchmark.jsonl").read_text().splitlines()]


def test_checkpoints_are_scored_at_their_steps(benched, asked, write_recipe, tmp_path, capsys):
    recipe, folder = write_recipe(benched), tmp_path / "run" / "align"
    assert main(["train", str(recipe)]) == 0
    calls, _ = asked
    data = benched["stages"][0]["benchmark"]["data"]
    for step, call in zip((4, 6), calls, strict=True):
        assert call[:2] == ["eval", str(folder / "checkpoints" / f"checkpoint-{step}")]
        assert call[2:] == [
            *("--tasks", "cv_bench", "--data", *data, "--limit", "9"),
            *("--no-blind", "--score", "likelihood"),
            *("--out", str(folder / "benchmark" / str(step))),
        ]
    assert lines(folder) == [
        {"step": 4, "cv_bench": 0.51, "cv_bench/Count": 0.25},
        {"step": 6, "cv_bench": 0.52, "cv_bench/Count": 0.25},
    ]
    assert "benchmark at step 4: cv_bench 0.510, cv_bench/Count 0.250" in capsys.readouterr().out


def test_what_a_kill_left_out_is_made_up_for(benched, asked, write_recipe, tmp_path):
    benched["stages"][0]["training"]["save_total_limit"] = 9
    recipe, folder = str(write_recipe(benched)), tmp_path / "run" / "align"
    assert main(["train", recipe]) == 0
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")  # as if killed while it scored step 4
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (folder / "benchmark.jsonl").unlink()
    assert main(["train", recipe]) == 0
    assert [line["step"] for line in lines(folder)] == [4, 6]


def test_one_that_fails_is_told_and_the_training_goes_on(
    benched, asked, write_recipe, tmp_path, capsys
):
    asked[1].append(2)
    assert main(["train", str(write_recipe(benched))]) == 0
    folder = tmp_path / "run" / "align"
    assert [set(line) for line in lines(folder)] == [{"step", "error"}] * 2
    log = folder / "benchmark" / "4" / "eval.log"
    told = capsys.readouterr()
    assert f"benchmark at step 4: vlm eval ended with 2, see {log}" in told.out
    assert "stage align: trained to its end, but its benchmark failed at step 4, 6" in told.err
    assert json.loads((folder / "manifest.json").read_text())["benchmark_failed_at"] == [4, 6]
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0  # done before
    assert "its benchmark failed at step 4, 6" in capsys.readouterr().err
    assert (folder / "model.safetensors").exists()


def test_files_that_are_missing_are_told_before_training(benched, write_recipe, capsys):
    words = ["--stages.align.benchmark.data", "[gone.parquet]"]
    assert main(["train", str(write_recipe(benched)), *words]) == 2
    assert "stages.align.benchmark.data: gone.parquet is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tasks", "cv_bensh"], "did you mean 'cv_bench'"),
        (["--score", "likelyhood"], "choose from likelihood, generation"),
        (["--protocl", "official"], "did you mean --protocol?"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--device", "gpu"], "device gpu cannot be used"),
    ],
)
def test_what_vlm_eval_refuses_is_told_before_training(
    words, sentence, benched, write_recipe, tmp_path, capsys
):
    benched["stages"][0]["benchmark"]["options"] = words
    assert main(["train", str(write_recipe(benched))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlm train: stages.align.benchmark: vlm eval --tasks cv_bench --data")
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_of_another_task_are_told_before_training(benched, write_recipe, capsys):
    benched["stages"][0]["benchmark"]["tasks"] = ["video_choice"]
    assert main(["train", str(write_recipe(benched)), "--check"]) == 2
    assert "questions.parquet" in capsys.readouterr().err


@pytest.mark.slow
def test_vlm_eval_scores_a_checkpoint(benched, write_recipe, tmp_path):
    benched["stages"][0]["benchmark"] |= {
        "every": 100,
        "options": ["--no-blind", "--strategy", "direct"],
    }
    assert main(["train", str(write_recipe(benched))]) == 0
    (line,) = lines(tmp_path / "run" / "align")
    assert line["step"] == 6 and 0 <= line["cv_bench"] <= 1, line
