"""Does `vlm eval` work from the command line: a real model, a kill, every kind of bad input?"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm.cli import main


@pytest.fixture(scope="module")
def folder(tiny_vlm, tmp_path_factory) -> Path:
    """A saved tiny model."""
    model, processor = tiny_vlm
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_benchmark) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("data") / "questions.parquet", 12)


def score(model: object, data: object, out: Path, *more: str) -> int:
    command = ["eval", str(model), "--data", str(data), "--out", str(out), "--max-new-tokens", "6"]
    return main([*command, *more])


def outcome(out: Path) -> tuple[dict, list[str], list[str]]:
    """Return what must be equal between two runs: all but times."""
    results = json.loads((out / "results.json").read_text("utf-8"))
    results.pop("run")
    report = (out / "report.md").read_text("utf-8").splitlines()
    samples = sorted((out / "samples.jsonl").read_text("utf-8").splitlines())
    return results, [line for line in report if not line.startswith("Time:")], samples


def test_a_run_writes_table_report_and_results(folder, data, tmp_path, capsys):
    assert score(folder, data, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "CV-Bench schema, n=48; not the published files" in printed
    assert "Relation" in printed and "chance" in printed and str(tmp_path / "report.md") in printed
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert set(results["tasks"]) == {"Relation", "Count", "Depth", "Distance"}
    for cell in results["tasks"].values():
        assert {"n", "accuracy", "low", "high", "chance", "blind"} <= cell.keys()
        assert cell["low"] <= cell["accuracy"] <= cell["high"]
    assert len((tmp_path / "samples.jsonl").read_text("utf-8").splitlines()) == 1 + 96
    assert (tmp_path / "gallery.png").stat().st_size > 10_000


def test_results_do_not_depend_on_the_batch_size(folder, data, tmp_path):
    for size in (1, 8):
        score(folder, data, tmp_path / str(size), "--batch-size", str(size), "--limit", "16")
    rows = [
        {
            (row["index"], row["view"]): row
            for row in map(
                json.loads, (tmp_path / size / "samples.jsonl").read_text().splitlines()[1:]
            )
        }
        for size in ("1", "8")
    ]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 32
    for key, one in rows[0].items():
        other = rows[1][key]
        assert one.pop("log_likelihoods") == pytest.approx(other.pop("log_likelihoods"), abs=1e-4)
        assert one == other


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(folder, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    score(folder, data, whole, "--batch-size", "2")
    command = [sys.executable, "-m", "vlm", "eval", str(folder), "--data", str(data), "--out"]
    options = [str(killed), "--max-new-tokens", "6", "--batch-size", "2"]
    process = subprocess.Popen([*command, *options], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    samples, deadline = killed / "samples.jsonl", time.monotonic() + 60
    while not samples.exists() or samples.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    held = samples.read_bytes().count(b"\n")
    assert 20 <= held < 97 and not (killed / "results.json").exists()
    score(folder, data, killed, "--batch-size", "2")
    run = json.loads((killed / "results.json").read_text("utf-8"))["run"]
    assert run["answers_found"] in (held - 1, held) and run["answers_new"] > 0
    assert outcome(killed) == outcome(whole)


def test_retrained_weights_in_the_same_folder_are_noticed(folder, data, tmp_path, capsys):
    from vlm import load_model

    model, processor = load_model(folder)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    score(tmp_path / "model", data, tmp_path / "out", "--limit", "8")
    model.lm_head.weight.data[0, 0] += 1.0
    model.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    score(tmp_path / "model", data, tmp_path / "out", "--limit", "8")
    assert "holds answers of another run (weights changed)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/results.json").read_text())["run"]["answers_found"] == 0


def test_list_names_everything(capsys):
    assert main(["eval", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("cv_bench", "official", "cambrian", "lmms", "reason", "direct"):
        assert f"  {name} " in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "cv_bensh"], "unknown task 'cv_bensh' (did you mean 'cv_bench'?)"),
        (["--protocol", "offcial"], "unknown protocol 'offcial' (did you mean 'official'?)"),
        (["--strategy", "guess"], "unknown strategy 'guess'"),
        (["--score", "luck"], "--score is ['luck']; choose from likelihood, generation"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--batch-size", "-1"], "--batch-size is -1; it must be at least 1"),
        (["--data", "none.parquet"], "no data file at none.parquet"),
    ],
)
def test_bad_input_is_one_sentence(folder, data, tmp_path, capsys, change, message):
    assert score(folder, data, tmp_path, *change) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_folders_are_one_sentence(folder, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert score(tmp_path / "empty", data, tmp_path / "out") == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert score(folder, data, tmp_path / "file" / "out") == 2
    assert "cannot be made" in capsys.readouterr().err
    assert main(["eval", str(folder), "--data", str(data)]) == 2
    assert "--out DIR" in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "which model?" in capsys.readouterr().err


def test_help_is_light():
    code = (
        "import sys, runpy; sys.argv = ['vlm', 'eval', '--help']\n"
        "try: runpy.run_module('vlm', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout
