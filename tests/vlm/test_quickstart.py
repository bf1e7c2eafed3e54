"""Does the quickstart run its steps once each, in order, and go on where it was killed?"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vlm import quickstart
from vlm.child_commands import only_one
from vlm.cli import COMMANDS
from vlm.errors import UserError

CELL = {"n": 8, "accuracy": 0.9, "low": 0.8, "high": 0.95, "chance": 0.5, "blind": 0.5,
        "blind_low": 0.4, "blind_high": 0.6}  # fmt: skip


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Replace the commands by a record of them; scoring writes results as `vlm eval` does."""
    ran = []

    def run(step, lock):
        ran.append([words[0] for words in step.commands])
        for words in step.commands:
            if words[0] == "eval":
                out = tmp_path / words[words.index("--out") + 1]
                out.mkdir(parents=True, exist_ok=True)
                tasks = dict.fromkeys(quickstart.TASKS, CELL)
                (out / "results.json").write_text(json.dumps({"tasks": tasks}))
        return 2.0, 100

    monkeypatch.setattr(quickstart, "_run_step", run)
    return ran


def arguments(out, seed=0, rehearse=True):
    return argparse.Namespace(out=out, seed=seed, rehearse=rehearse)


def test_steps_are_commands_of_the_suite_with_the_seed_everywhere(tmp_path):
    steps = quickstart.plan(tmp_path, 7, rehearse=False)
    for step in steps:
        for words in step.commands:
            assert words[0] in COMMANDS
            if words[0] != "eval":
                assert "--seed=7" in words or words[words.index("--seed") + 1] == "7"


def test_report_and_summary_hold_every_task(tmp_path, fake, capsys):
    assert quickstart.run(arguments(tmp_path)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] == 10.0 and report["peak_memory_mb"] == 100
    assert set(report["tasks"]) == {"Relation", "Count", "Depth", "Distance"}
    for cell in report["tasks"].values():
        assert {"n", "accuracy", "low", "high", "chance", "blind"} <= set(cell)
    out = capsys.readouterr().out
    assert "vlm chat" in out and "vlm eval" in out and "0.900" in out


def test_a_second_run_does_nothing_twice_and_another_seed_is_refused(tmp_path, fake):
    quickstart.run(arguments(tmp_path))
    before = len(fake)
    quickstart.run(arguments(tmp_path))
    assert len(fake) == before == 5
    with pytest.raises(UserError, match="choose another --out"):
        quickstart.run(arguments(tmp_path, seed=1))


def test_a_failing_command_is_told_and_the_step_is_not_done(tmp_path, monkeypatch):
    step = quickstart.Step("broken", [["train", str(tmp_path / "none.yaml")]])
    monkeypatch.setattr(quickstart, "plan", lambda *_: [step])
    with pytest.raises(UserError, match="exit code 2"):
        quickstart.run(arguments(tmp_path))
    (entry,) = json.loads((tmp_path / "steps.json").read_text())["steps"].values()
    assert not entry["done"] and entry["starts"] == 1


def test_the_command_that_failed_is_named_not_the_one_stopped_for_it(tmp_path, monkeypatch):
    slow = ["data", "build", "scenes", "--out", str(tmp_path / "data"), "--train", "100000"]
    step = quickstart.Step("broken", [slow, ["train", str(tmp_path / "none.yaml")]])
    monkeypatch.setattr(quickstart, "plan", lambda *_: [step])
    with pytest.raises(UserError, match="vlm train"):
        quickstart.run(arguments(tmp_path))


def test_two_at_once_in_one_folder_are_refused(tmp_path, fake):
    with (
        only_one(tmp_path, "a quickstart"),
        pytest.raises(UserError, match="still at work"),
    ):
        quickstart.run(arguments(tmp_path))


@pytest.mark.parametrize("content", ["{}", "no json", "[1]"])
def test_a_foreign_file_in_the_way_is_told(tmp_path, fake, content):
    (tmp_path / "steps.json").write_text(content)
    with pytest.raises(UserError, match="was not written for a quickstart"):
        quickstart.run(arguments(tmp_path))


def test_a_folder_that_cannot_be_made_is_told(fake):
    from pathlib import Path

    with pytest.raises(UserError, match="cannot be made"):
        quickstart.run(arguments(Path("/proc/x")))


def wait_for_the_lock(folder, deadline):
    while time.monotonic() < deadline:
        try:
            with only_one(folder, "a quickstart"):
                return
        except UserError:
            time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rehearsal_goes_on_to_the_end(tmp_path):
    command = [sys.executable, "-m", "vlm", "quickstart", "--rehearse", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "base/encoder").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    wait_for_the_lock(tmp_path, deadline)  # the commands it started are killed, not gone yet
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout.count("done before") == 1  # the scenes
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"]["Depth"]["n"] == 16
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.stdout.count("done before") == 5
