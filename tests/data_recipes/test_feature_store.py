"""Are stored features read back to the bit, by anyone, and never when they are torn?"""

import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from data_recipes import feature_writer
from data_recipes.feature_store import (
    ENTRY,
    FeatureStore,
    Layout,
    LostFeaturesError,
    Picture,
    content_of,
    state_of,
)
from data_recipes.feature_writer import FeatureWriter, NoRoomError
from data_recipes.pictures import PictureViews, Shown, is_stored, stored_features
from vlm.errors import UserError

LAYOUT = Layout(((2, 3, 5), (1, 1, 7)), (torch.float32, torch.bfloat16))


def maps_of(seed, views=1):
    torch.manual_seed(seed)
    return [
        torch.randn(views, *shape).to(dtype)
        for shape, dtype in zip(LAYOUT.shapes, LAYOUT.dtypes, strict=True)
    ]


def picture(number):
    return Picture(content_of(str(number).encode()), (10 + number, 20))


def write(folder, numbers, budget=10**9):
    with FeatureWriter(folder, LAYOUT, budget) as writer:
        for number in numbers:
            writer.add(picture(number), (1, number + 1), maps_of(number, number + 1))


def assert_holds(store, numbers):
    for number in numbers:
        found = store.features(picture(number), (1, number + 1))
        assert found is not None
        assert all(map(torch.equal, found, maps_of(number, number + 1)))


def test_several_writers_and_any_reader(tmp_path):
    for numbers in ((0, 1, 2), (3, 4), ()):
        write(tmp_path, numbers)
    store = FeatureStore(tmp_path, LAYOUT)
    assert len(store) == 5
    for reader in (store, pickle.loads(pickle.dumps(store))):
        assert_holds(reader, range(5))
    assert store.features(picture(0), (9, 9)) is None
    assert store.features(picture(7), (1, 8)) is None
    assert [each.shape for each in LAYOUT.empty()] == [(0, 2, 3, 5), (0, 1, 1, 7)]


def test_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    shares = [range(n, 12, 3) for n in range(3)]
    children = [context.Process(target=write, args=(tmp_path, share)) for share in shares]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert_holds(FeatureStore(tmp_path, LAYOUT), range(12))


@pytest.mark.parametrize(
    "damage",
    [
        lambda features, entries: os.truncate(entries, 3 * ENTRY.itemsize - 1),
        lambda features, entries: os.truncate(features, features.stat().st_size - 1),
        lambda features, entries: features.unlink(),
        lambda features, entries: entries.write_bytes(entries.read_bytes() + bytes(ENTRY.itemsize)),
    ],
    ids=["record cut", "maps cut", "maps gone", "zeros after a crash"],
)
def test_torn_entries_are_passed_over(damage, tmp_path, request):
    write(tmp_path, range(3))
    (features,), (entries,) = tmp_path.glob("*.features"), tmp_path.glob("*.entries")
    damage(features, entries)
    store = FeatureStore(tmp_path, LAYOUT)
    name = request.node.callspec.id
    whole = {"record cut": 2, "maps cut": 2, "maps gone": 0}.get(name, 3)
    assert len(store) == whole
    assert_holds(store, range(whole))
    write(tmp_path, range(3))  # and what is stored again is found
    assert_holds(FeatureStore(tmp_path, LAYOUT), range(3))


def test_a_writer_that_is_killed_leaves_what_it_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_writer, "FLUSH_BYTES", 3 * LAYOUT.entry_bytes(1))

    def be_killed():
        with FeatureWriter(tmp_path, LAYOUT, 10**9) as writer:
            for number in range(5):
                writer.add(picture(number), (1, 1), maps_of(number))
            os._exit(9)

    child = multiprocessing.get_context("fork").Process(target=be_killed)
    child.start()
    child.join()
    store = FeatureStore(tmp_path, LAYOUT)
    assert len(store) == 3
    assert all(map(torch.equal, store.features(picture(2), (1, 1)), maps_of(2)))


def test_a_budget_is_kept_and_what_fits_stays(tmp_path):
    room = 2 * (LAYOUT.entry_bytes(1) + ENTRY.itemsize) + 5
    with pytest.raises(NoRoomError), FeatureWriter(tmp_path, LAYOUT, room) as writer:
        for number in range(3):
            writer.add(picture(number), (1, 1), maps_of(number))
            writer.flush()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room
    assert len(FeatureStore(tmp_path, LAYOUT)) == 2


@pytest.mark.parametrize("call", [0, 1])
def test_a_full_disk_is_told_and_names_nothing_half_written(call, tmp_path, monkeypatch):
    calls = iter(range(9))

    def fsync(_):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_writer.os, "fsync", fsync)
    with pytest.raises(NoRoomError):
        write(tmp_path, range(3))
    assert len(FeatureStore(tmp_path, LAYOUT)) == 3 * call
    assert_holds(FeatureStore(tmp_path, LAYOUT), range(3 * call))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
@pytest.mark.parametrize("count", [3, 300], ids=["within a stream's buffer", "beyond it"])
def test_a_disk_that_is_really_full(count, tmp_path, monkeypatch):
    """Its error comes again where a stream is closed."""
    opened = Path.open

    def on_full_disk(self, *args):
        return opened(Path("/dev/full") if self.suffix == ".features" else self, "wb")

    monkeypatch.setattr(Path, "open", on_full_disk)
    with pytest.raises(NoRoomError), FeatureWriter(tmp_path, LAYOUT, 10**9) as writer:
        for number in range(count):
            writer.add(picture(number), (1, 1), maps_of(number))
    assert len(FeatureStore(tmp_path, LAYOUT)) == 0


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(UserError, match=r"gone \(No such file or directory\); make it writable"):
        write(tmp_path / "gone", range(1))


def test_a_file_may_be_larger_than_the_memory(tmp_path):
    write(tmp_path, range(2))
    (features,) = tmp_path.glob("*.features")
    os.truncate(features, 2 << 40)
    assert_holds(FeatureStore(tmp_path, LAYOUT), range(2))


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 9), Path.unlink])
def test_features_that_are_deleted_while_in_use(damage, tmp_path):
    write(tmp_path, range(2))
    store = FeatureStore(tmp_path, LAYOUT)
    damage(*tmp_path.glob("*.features"))
    with pytest.raises(LostFeaturesError, match=r"\.features: stored features were deleted"):
        store.features(picture(1), (1, 2))


@pytest.fixture
def processor(make_model):
    return make_model(tiling={"type": "anyres"})[1].image_processor


def store_files(folder, paths, processor):
    """Store zeros as the features of files' pictures; return the opened store."""
    views = PictureViews([Shown(path, 1) for path in paths], processor, reopen(folder))
    with FeatureWriter(folder, LAYOUT, 10**9) as writer:
        for item in map(views.__getitem__, range(len(views))):
            writer.note(item.state, item.picture)
            if item.pixel_values is not None:
                shape = len(item.pixel_values)
                zeros = [
                    torch.zeros(shape, *each.shape[1:], dtype=each.dtype) for each in maps_of(0)
                ]
                writer.add(item.picture, item.grid, zeros)
    return reopen(folder)


def reopen(folder):
    return FeatureStore(folder, LAYOUT)


def test_files_are_known_by_state_then_by_content(tmp_path, make_image, processor, monkeypatch):
    folder, path, copy = tmp_path / "store", tmp_path / "a.png", tmp_path / "b.png"
    folder.mkdir()
    make_image(90, 30).save(path)
    store = store_files(folder, [path], processor)
    assert is_stored(Shown(str(path), 1), processor, store)
    sizes, maps = stored_features([path], processor, store)
    assert sizes == [(90, 30)]
    assert [len(each) for each in maps] == [processor.plan((90, 30)).num_views] * 2

    copy.write_bytes(path.read_bytes())
    assert not is_stored(Shown(str(copy), 1), processor, store)  # not without reading it
    assert is_stored(Shown(str(copy), 1), processor, store, reading=True)
    assert not is_stored(Shown(str(tmp_path / "gone.png"), 1), processor, store, reading=True)
    assert stored_features([copy], processor, store)[0] == sizes
    entries = len(store)
    store = store_files(folder, [copy], processor)
    assert is_stored(Shown(str(copy), 1), processor, store)
    assert len(store) == entries


def test_a_changed_picture_is_noticed(tmp_path, make_image, processor):
    folder, path = tmp_path / "store", tmp_path / "a.bmp"
    folder.mkdir()
    make_image(40, 40, 0).save(path)
    before = state_of(path), path.stat().st_size
    store = store_files(folder, [path], processor)
    status = path.stat()
    time.sleep(0.01)
    make_image(40, 40, 1).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and tar do
    assert path.stat().st_size == before[1]
    assert state_of(path) != before[0]
    assert not is_stored(Shown(str(path), 1), processor, store)
    with pytest.raises(LostFeaturesError, match="was changed after its features had been stored"):
        stored_features([path], processor, store)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_what_is_wrong_with_a_file_is_told_as_without_a_store(content, tmp_path, processor):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    views = PictureViews([Shown(str(path), 1)], processor, reopen(tmp_path))
    assert views[0] is None
    with pytest.raises(UserError, match="no such file" if content is None else "cannot be read"):
        stored_features([path], processor, reopen(tmp_path))
