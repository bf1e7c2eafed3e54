"""Is a torn checkpoint passed over, and are the newest whole ones kept?"""

import pytest

from train.checkpoints import damaged, is_whole, newest, prune, seal
from vlm.done import write_flushed


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(step, sealed=True):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "part").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        (folder / "part" / "state").write_bytes(b"y" * 10)
        if sealed:
            seal(folder)
        return folder

    return make


def test_newest_whole_one_by_step_not_by_name(make_checkpoint, tmp_path):
    assert newest(tmp_path / "nowhere") is None
    make_checkpoint(9)
    ten = make_checkpoint(10)
    make_checkpoint(11, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest(tmp_path) == ten


@pytest.mark.parametrize("name", ["model.safetensors", "part/state", "complete.json"])
def test_torn_in_any_file(make_checkpoint, tmp_path, name):
    whole, torn = make_checkpoint(1), make_checkpoint(2)
    file = torn / name
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_whole(torn)
    assert newest(tmp_path) == whole
    assert damaged(tmp_path) == [torn]
    file.unlink()
    assert newest(tmp_path) == whole


def test_what_was_never_whole_is_not_damaged(make_checkpoint, tmp_path):
    make_checkpoint(3, sealed=False)
    (make_checkpoint(1) / "model.safetensors").unlink()
    make_checkpoint(2)
    assert damaged(tmp_path) == []


def test_others_may_read_what_they_may_look_into(tmp_path):
    tmp_path.chmod(0o750)
    file = tmp_path / "model.safetensors"
    file.touch(0o600)
    seal(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o640


def test_prune_keeps_the_newest_whole_ones(make_checkpoint, tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(step)
    make_checkpoint(0, sealed=False)
    make_checkpoint(5, sealed=False)  # newer than all whole ones: perhaps still being written
    prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 6
    prune(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.json"
    write_flushed(path, "old")
    write_flushed(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
