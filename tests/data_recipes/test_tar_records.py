"""Is sample i of a WebDataset shard found by its offset, its pictures read where they lie?"""

import json
import pickle
import tarfile
from io import BytesIO

import pytest

from data_recipes.image_files import load, read
from data_recipes.records import to_messages
from data_recipes.tar_records import TarRecords
from vlm.errors import UserError

TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
TWO = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "1"}]
TEXT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture
def write(tmp_path):
    """({name: bytes or value}, ...) -> a tar with these members."""

    def make(members, tar_format=tarfile.USTAR_FORMAT):
        path = tmp_path / "000.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            for name, value in members:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
        return path

    return make


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize("folder", ["", "./", "a.b/", "long/" * 30, "é" * 60])
def test_samples_by_number(write, picture, folder, tar_format):
    if tar_format == tarfile.USTAR_FORMAT and len(folder.encode()) > 90:
        folder = folder[:40]
    members = []
    for n in range(5):
        members += [(f"{folder}{n:03d}.png", picture(n)), (f"{folder}{n:03d}.json", {"x": n})]
    path = write(members, tar_format)
    records = TarRecords(path)
    assert len(records) == 5
    for row in (4, 0, 3):
        assert records[row]["x"] == row
        assert records[row]["id"] == f"{folder}{row:03d}"
        (image,) = records[row]["image"]
        assert read(image) == picture(row)
        assert str(image) == f"{path}: {folder}{row:03d}.png"
        assert load(image).size == load(picture_file(picture(row), path)).size
    assert records.where(3) == str(records.place(3)) == f"{path}, sample {folder}003"
    with pytest.raises(IndexError):
        records[5]


def picture_file(data, path):
    path.with_name("alone.png").write_bytes(data)
    return path.with_name("alone.png")


@pytest.mark.parametrize(
    ("members", "images"),
    [
        ([("7.json", {"conversations": TEXT})], []),
        ([("7.json", {"conversations": TURNS, "image": "a/b.jpg"})], ["a/b.jpg"]),
        ([("7.png", 0), ("7.json", {"conversations": TURNS})], [0]),
        ([("7.png", 0), ("7.json", {"conversations": TURNS, "image": "7.png"})], [0]),
        ([("d/7.png", 0), ("d/7.json", {"conversations": TURNS, "image": "d/7.png"})], [0]),
        ([("7.png", 0), ("7.json", {"conversations": TURNS, "image": "png"})], [0]),
        ([("7.1.png", 1), ("7.0.png", 0), ("7.json", {"conversations": TWO})], [1, 0]),
        (
            [
                ("7.1.png", 1),
                ("7.0.png", 0),
                ("7.json", {"conversations": TWO, "images": ["0.png", "1.png"]}),
            ],
            [0, 1],
        ),
        ([("7.png", 0), ("7.cls", b"3"), ("7.txt", b"A cat.")], [0]),
        ([("7.png", 0), ("7.json", {"url": "x", "caption": "A cat."}), ("7.txt", b"Else.")], [0]),
        ([("7.PNG", 0), ("7.json", {"conversations": TURNS})], [0]),
    ],
)
def test_what_a_sample_may_hold(write, picture, members, images):
    members = [
        (name, picture(value) if isinstance(value, int) else value) for name, value in members
    ]
    records = TarRecords(write(members))
    raw = records[0]
    if "caption" in raw:
        assert raw["caption"] == "A cat."
        raw["conversations"] = [TURNS[0], {"from": "gpt", "value": raw.pop("caption")}]
    found = to_messages(raw, "x").images
    assert [f if isinstance(f, str) else read(f) for f in found] == [
        value if isinstance(value, str) else picture(value) for value in images
    ]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("7.png", b"x")], "sample 7: has no .json and no .txt, only 7.png"),
        ([("7.json", b"{")], "sample 7: broken JSON or text"),
        ([("7.txt", b"\xff")], "sample 7: broken JSON or text"),
        (
            [("7.png", b"x"), ("7.json", {"image": "8.png"})],
            "sample 7: 'image' names '8.png', but the sample's pictures are 7.png",
        ),
    ],
)
def test_samples_that_are_no_record(write, members, sentence):
    records = TarRecords(write([("6.json", {"x": 1}), *members]))
    assert records[0] == {"id": "6", "x": 1}
    with pytest.raises(UserError) as error:
        records[1]
    assert sentence in str(error.value)


def test_what_is_no_sample_is_passed_over(write):
    records = TarRecords(write([("README", b"x"), (".hidden", b"x"), ("1.json", {"x": 1})]))
    assert [records[row] for row in range(len(records))] == [{"id": "1", "x": 1}]


def test_files_that_are_no_tar(tmp_path, write):
    with pytest.raises(UserError, match=r"gone\.tar: cannot be read"):
        TarRecords(tmp_path / "gone.tar")
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with pytest.raises(UserError, match=r"text\.tar: is no whole tar"):
        TarRecords(tmp_path / "text.tar")
    with pytest.raises(UserError, match="holds no sample"):
        TarRecords(write([("README", b"x")]))


@pytest.mark.parametrize("where", ["data", "header"])
def test_a_tar_that_breaks_off_is_refused(tmp_path, write, where):
    path = write([(f"{n}.json", {"x": "y" * 600}) for n in range(4)])
    second = 3 * 512  # a header and two blocks each
    path.write_bytes(path.read_bytes()[: second + (900 if where == "data" else 300)])
    with pytest.raises(UserError, match=r"000\.tar"):
        TarRecords(path)


def test_a_broken_header_is_not_taken_for_the_end(write):
    path = write([(f"{n}.json", {"x": n}) for n in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="the tar is broken at byte 2048"):
        TarRecords(path)


def test_index_is_kept_and_nothing_stays_open(write, monkeypatch, tmp_path):
    path = write([(f"{n}.json", {"x": n}) for n in range(4)])
    records = TarRecords(path)
    assert (tmp_path / ".000.tar.index").stat().st_size == 64 + 8 * 5
    monkeypatch.setattr("data_recipes.tar_records.scan_tar", lambda _: pytest.fail("scanned again"))
    assert TarRecords(path)[2] == {"id": "2", "x": 2}
    assert pickle.loads(pickle.dumps(records))[3] == {"id": "3", "x": 3}
    moved = path.rename(tmp_path / "moved.tar")
    with pytest.raises(UserError, match="cannot be read"):
        records[0]
    moved.rename(path)
    assert records[0] == {"id": "0", "x": 0}
