"""Are rows of a parquet file records like any others, read by row group, pictures apart?"""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_recipes import parquet_records
from data_recipes.image_files import Inside, load, read, size_of
from data_recipes.parquet_records import KEPT_OPEN, ParquetRecords, RowGroups
from data_recipes.records import to_messages
from data_recipes.regroup import regroup
from vlm.cli import main
from vlm.errors import UserError

TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
TEXT_TURNS = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture
def write(tmp_path):
    """(rows, **options) -> a parquet file of them."""

    def make(rows, schema=None, name="data.parquet", **options):
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
        return path

    return make


def record(records, row):
    return to_messages(records[row], records.place(row))


def test_pictures_as_hugging_face_stores_them(write, picture):
    rows = [
        {"id": str(n), "image": {"bytes": picture(n), "path": f"{n}.png"}, "conversations": TURNS}
        for n in range(5)
    ]
    rows[3] = {"id": "3", "image": None, "conversations": TEXT_TURNS}
    path = write(rows, row_group_size=2)
    records = ParquetRecords(path)
    assert len(records) == 5
    for row in (4, 0, 2, 1):
        (image,) = record(records, row).images
        assert read(image) == picture(row)
        assert load(image).size == size_of(image)
        assert str(image) == f"{path}, row {row}, picture 1"
    assert record(records, 3).images == ()
    assert records.where(3) == str(records.place(3)) == f"{path}, row 3"


def test_several_pictures_and_turns_by_role(write, picture):
    turns = [
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "1"},
    ]
    some = [{"bytes": picture(n), "path": None} for n in (0, 1)]
    texts = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    path = write([{"messages": turns, "images": some}, {"messages": texts, "images": []}])
    records = ParquetRecords(path)
    assert [read(image) for image in record(records, 0).images] == [picture(0), picture(1)]
    assert record(records, 1).images == ()


@pytest.mark.parametrize("several", [False, True])
def test_plain_bytes(write, picture, several):
    wrap = (lambda value: [value]) if several else (lambda value: value)
    rows = [{"image": wrap(picture(0)), "conversations": TURNS}]
    rows.append({"image": None, "conversations": TEXT_TURNS})
    records = ParquetRecords(write(rows))
    assert [read(image) for image in record(records, 0).images] == [picture(0)]
    assert record(records, 1).images == ()


@pytest.mark.parametrize("value", ["a.png", {"bytes": None, "path": "a.png"}])
def test_paths_stay_paths(write, value):
    schema = None
    if isinstance(value, dict):
        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), ("conversations", pa.list_(turn))])
    records = ParquetRecords(write([{"image": value, "conversations": TURNS}], schema))
    assert record(records, 0).images == ("a.png",)


def test_keys_that_other_rows_have_are_not_there(write):
    rows = [{"conversations": TURNS, "image": "a.png", "id": None}]
    rows.append({"conversations": [{"role": "user", "content": "Hi?"}], "image": None, "id": "b"})
    records = ParquetRecords(write(rows))
    assert records[0] == {"conversations": TURNS, "image": "a.png"}
    assert records[1] == {"conversations": [{"role": "user", "content": "Hi?"}], "id": "b"}


def test_a_picture_is_not_read_with_the_text_and_a_row_group_not_twice(write, picture, monkeypatch):
    rows = [
        {"image": {"bytes": picture(n), "path": "x"}, "conversations": TURNS, "other": n}
        for n in range(6)
    ]
    records = ParquetRecords(write(rows, row_group_size=3))
    read_columns = []
    real = ParquetRecords._read

    def spy(self, group, columns):
        read_columns.append((group, sorted({name.partition(".")[2] for name in columns})))
        return real(self, group, columns)

    monkeypatch.setattr(ParquetRecords, "_read", spy)
    images = [records[row]["image"] for row in (0, 1, 2)]
    assert len(read_columns) == 1
    assert "bytes" not in read_columns[0][1]
    for image in images:
        read(image)
    assert read_columns[1:] == [(0, ["bytes"])]


def test_row_groups_are_dropped_oldest_first():
    table = pa.table({"a": [0] * 100})
    groups = RowGroups(kept_bytes=3 * table.nbytes)
    for key in "abcad":  # a is used again before d comes
        groups.get((key,), lambda: table)
    assert groups.nbytes() == 3 * table.nbytes
    for key in "acd":
        groups.get((key,), lambda: pytest.fail("is kept"))
    other = pa.table({"b": [1]})
    assert groups.get(("b",), lambda: other) is other


def test_few_files_stay_open(write):
    groups = RowGroups()
    paths = [write([{"caption": str(n)}], name=f"{n}.parquet") for n in range(KEPT_OPEN + 3)]
    parts = [ParquetRecords(path, groups) for path in paths]
    assert [part[0] for part in parts] == [{"caption": str(n)} for n in range(len(parts))]
    assert len(groups._files) == KEPT_OPEN


def test_pickled_without_what_it_keeps(write):
    records = ParquetRecords(write([{"id": str(n), "conversations": TURNS} for n in range(3)]))
    assert pickle.loads(pickle.dumps(records))[2]["id"] == "2"
    assert records._groups.nbytes() == 0


def test_inside_is_equal_by_file_and_key(write, picture):
    rows = [{"image": {"bytes": picture(0), "path": "x"}, "conversations": TURNS}]
    path = write(rows)
    assert ParquetRecords(path)[0]["image"] == ParquetRecords(path)[0]["image"]
    again = pickle.loads(pickle.dumps(ParquetRecords(path)[0]["image"]))
    assert isinstance(again, Inside)
    assert read(again) == picture(0)


def test_files_that_are_no_data(write, tmp_path):
    with pytest.raises(UserError, match=r"gone\.parquet: cannot be read \(no such file\)"):
        ParquetRecords(tmp_path / "gone.parquet")
    (tmp_path / "text.parquet").write_text("no parquet, but long enough to be one")
    with pytest.raises(UserError, match=r"text\.parquet: is no readable parquet file"):
        ParquetRecords(tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"none of its columns question is one of conversations"):
        ParquetRecords(write([{"question": "Why?"}]))
    empty = pa.schema([("conversations", pa.string())])
    with pytest.raises(UserError, match="holds no record"):
        ParquetRecords(write([], empty))


def test_a_row_without_its_picture_is_a_fault(write, picture):
    rows = [{"image": {"bytes": picture(0), "path": None}, "conversations": TURNS}]
    rows.append({"image": {"bytes": b"", "path": "lost.png"}, "conversations": TURNS})
    records = ParquetRecords(write(rows))
    with pytest.raises(UserError, match=r"data\.parquet, row 1, picture 1: it has no bytes"):
        load(record(records, 1).images[0])


def test_large_row_groups_are_refused_and_can_be_made_small(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parquet_records, "MAX_TEXT_BYTES", 1000)
    rows = [{"id": str(n), "conversations": TURNS, "note": "n" * 50} for n in range(100)]
    path, small = write(rows), tmp_path / "small.parquet"
    with pytest.raises(UserError, match=r"data\.parquet: a row group has .* `vlm data regroup`"):
        ParquetRecords(path)
    assert main(["data", "regroup", str(path), str(small), "--rows", "7"]) == 0
    assert "100 rows" in capsys.readouterr().out
    assert pq.read_table(small) == pq.read_table(path)
    assert pq.ParquetFile(small).metadata.row_group(0).num_rows == 7
    assert len(ParquetRecords(small)) == 100
    with pytest.raises(UserError, match="is there already"):
        regroup(path, small, 7)
    with pytest.raises(UserError, match="cannot be written"):
        regroup(tmp_path / "gone.parquet", tmp_path / "new.parquet", 7)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))
