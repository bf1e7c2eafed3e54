"""Do answers survive kills and strangers: torn lines, other models, unwritable folders?"""

import json
from pathlib import Path

import pytest

from eval.samples import SampleStore
from vlm.errors import UserError

ONE, TWO = {"weights": "one", "data": ["d"]}, {"weights": "two", "data": ["d"]}


def answer(index: int, view: str = "image") -> dict:
    return {"index": index, "view": view, "reply": "(B) \u2028 ü\n"}


def test_answers_are_taken_up_again(tmp_path: Path):
    store = SampleStore(tmp_path / "deep" / "er", ONE)
    store.append([answer(0), answer(1)])
    store.append([answer(0, "blind")])
    again = SampleStore(tmp_path / "deep" / "er", ONE)  # the first was never closed: a kill
    assert again.rows == store.rows and again.found == 3
    assert set(again.rows) == {(0, "image"), (1, "image"), (0, "blind")}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_dropped_and_not_glued_to_the_next(tmp_path: Path, cut: int):
    SampleStore(tmp_path, ONE).append([answer(0), answer(1)])
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    store = SampleStore(tmp_path, ONE)
    assert list(store.rows) == [(0, "image")]
    store.append([answer(1)])
    assert len(SampleStore(tmp_path, ONE).rows) == 2
    assert all(json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1])


def test_a_torn_first_line_begins_anew(tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text('{"identity": {"weig')
    SampleStore(tmp_path, ONE).append([answer(0)])
    assert len(SampleStore(tmp_path, ONE).rows) == 1


def test_another_models_answers_are_set_aside_and_come_back(tmp_path: Path):
    SampleStore(tmp_path, ONE).append([answer(0), answer(1)])
    other = SampleStore(tmp_path, TWO)
    assert other.rows == {} and other.changed == ["weights"]
    assert other.set_aside is not None and other.set_aside.exists()
    other.append([answer(5)])
    first = SampleStore(tmp_path, ONE)
    assert set(first.rows) == {(0, "image"), (1, "image")}
    assert set(SampleStore(tmp_path, TWO).rows) == {(5, "image")}


def test_a_strangers_file_is_not_touched(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"question": 1}\n')
    with pytest.raises(UserError, match="is no answers file of ours"):
        SampleStore(tmp_path, ONE)
    assert path.read_text() == '{"question": 1}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path):
    SampleStore(tmp_path, ONE).append([answer(0), answer(1)])
    path = tmp_path / "samples.jsonl"
    lines = path.read_text("utf-8").split("\n")
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]), "utf-8")
    with pytest.raises(UserError, match=r"samples\.jsonl:2: broken line"):
        SampleStore(tmp_path, ONE)


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write answers to .*; choose another folder"):
        SampleStore(tmp_path / "file" / "out", ONE)


def test_a_full_disk_keeps_what_is_saved(tmp_path: Path):
    store = SampleStore(tmp_path, ONE)
    store.append([answer(0)])
    store._file = open("/dev/full", "w", encoding="utf-8")
    with pytest.raises(UserError, match="1 are saved, the same command goes on"):
        store.append([answer(1)])
    store.close()
    assert list(SampleStore(tmp_path, ONE).rows) == [(0, "image")]
