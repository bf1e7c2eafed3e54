"""Are the built files what the rest of the suite, and CV-Bench's users, expect to read?"""

import json
import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_recipes.index import RecordIndex
from data_recipes.records import to_messages
from data_recipes.scenes.build import BuildSettings, build
from data_recipes.scenes.cli import add_build_arguments, run_build
from data_recipes.scenes.layout import Difficulty
from data_recipes.scenes.sets import benchmark_examples
from vlm.errors import UserError
from vlm.images import load_image

SETTINGS = BuildSettings(train=30, test_per_task=8, control=8, size=32)
CV_BENCH_COLUMNS = (
    "idx type task image question choices answer prompt filename source source_dataset "
    "source_filename target_class target_size bbox"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    build(out, SETTINGS)
    return out


def test_benchmark_has_cv_bench_s_columns_and_values(folder):
    table = pq.read_table(folder / "test.parquet")
    assert table.column_names == CV_BENCH_COLUMNS
    rows = table.to_pylist()
    assert {(row["type"], row["task"]) for row in rows} == {
        ("2D", "Relation"),
        ("2D", "Count"),
        ("3D", "Depth"),
        ("3D", "Distance"),
    }
    for row in rows:
        assert row["prompt"].startswith(
            row["question"] + " Select from the following choices.\n(A)"
        )
        assert row["answer"] in [f"({letter})" for letter in "ABCDEF"[: len(row["choices"])]]
        assert load_image(row["image"]["bytes"]).size == (32, 32)
        assert (
            (row["bbox"] is None) == (row["task"] == "Count") == (row["target_class"] is not None)
        )


def test_boxes_lie_on_the_drawn_frames(folder):
    rows = pq.read_table(folder / "control.parquet").to_pylist()
    for row in rows:
        picture = np.asarray(load_image(row["image"]["bytes"]), dtype=int)
        left, top, right, bottom = row["bbox"][0]
        red = (picture[..., 0] > 230) & (picture[..., 1] < 30) & (picture[..., 2] < 30)
        ys, xs = np.nonzero(red)
        assert xs.min() <= left + 2 and xs.max() >= right - 3
        assert ys.min() <= top + 2 and ys.max() >= bottom - 3


def test_records_pass_the_checks_of_training(folder):
    for name in ("captions.jsonl", "questions.jsonl"):
        path = folder / "train" / name
        index = RecordIndex(path)
        for i in range(len(index)):
            record = to_messages(index[i], index.where(i))
            assert len(record.images) == 1
            assert (folder / "train" / record.images[0]).exists()
    assert len(RecordIndex(folder / "train" / "questions.jsonl")) == SETTINGS.train


def test_files_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vlm"])  # processes start as the command's: without torch
    contents = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        build(out, BuildSettings(train=520, test_per_task=1, control=1, size=16), workers)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        contents.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_finished_work_is_kept_and_other_settings_are_refused(folder):
    before = (folder / "test.parquet").stat().st_mtime_ns
    build(folder, SETTINGS)
    assert (folder / "test.parquet").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        build(folder, BuildSettings(train=31, test_per_task=8, control=8, size=32))


def test_held_out_scenes_are_not_training_scenes(folder):
    train = {path.read_bytes() for path in (folder / "train" / "images").iterdir()}
    test = [row["image"]["bytes"] for row in pq.read_table(folder / "test.parquet").to_pylist()]
    assert len(train) == SETTINGS.train
    assert not train & set(test)


def test_command_builds_what_its_options_say(tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_build_arguments(parser)
    words = "--train 4 --test-per-task 2 --control 2 --size 16 --solid-share 1.0 --direct-share 1.0"
    out = tmp_path / "a"
    assert run_build(parser.parse_args([*words.split(), "--out", str(out)])) == 0
    assert "4 training scenes" in capsys.readouterr().out
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["difficulty"]["solid_share"] == 1.0
    for line in (out / "train" / "questions.jsonl").read_text().splitlines():
        turns = json.loads(line)["conversations"]
        assert turns
        assert all(re.fullmatch(r"\([A-F]\)", turn["value"]) for turn in turns[1::2])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train", "-1"),
        ("--size", "4"),
        ("--max-objects", "2"),
        ("--seed", "-1"),
        ("--workers", "0"),
        ("--noise", "nan"),
        ("--size-jitter", "5"),
        ("--relation-cells", "9"),
        ("--spacing", "6"),
    ],
)
def test_senseless_options_are_refused(tmp_path, option, value):
    import argparse

    parser = argparse.ArgumentParser()
    add_build_arguments(parser)
    with pytest.raises(UserError, match=option.strip("-").replace("-", "_")):
        run_build(parser.parse_args([option, value, "--out", str(tmp_path / "a")]))


def test_knobs_that_leave_a_case_without_scenes_end_with_a_sentence(tmp_path):
    crowded = Difficulty(min_objects=7, spacing=1.5, floating_share=0.0, solid_share=1.0)
    with pytest.raises(UserError, match="fit no open case"):
        list(benchmark_examples("Count", 43, 16, 0, crowded))
