"""Are several files one list of records, named by braces, each read by what its name ends in?"""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_recipes.index import RecordIndex
from data_recipes.parquet_records import ParquetRecords
from data_recipes.readers import data_files, expand, open_records
from vlm.errors import UserError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.json", ["a.json"]),
        ("{a,b}.json", ["a.json", "b.json"]),
        ("s{8..11}.tar", ["s8.tar", "s9.tar", "s10.tar", "s11.tar"]),
        ("s{08..10}.tar", ["s08.tar", "s09.tar", "s10.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a}", ["a"]),
    ],
)
def test_braces(text, names):
    assert list(expand(text)) == names


def test_files_in_a_row(tmp_path):
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"id": str(n), "conversations": turns} for n in range(6)]
    (tmp_path / "part-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "part-1.json").write_text(json.dumps(rows[3:4]))
    pq.write_table(pa.Table.from_pylist(rows[4:]), tmp_path / "part-2.parquet")
    records = open_records(f"{tmp_path}/part-{{0.jsonl,1.json,2.parquet}}")
    assert [records[row] for row in range(len(records))] == rows
    assert records.where(2) == str(records.place(2)) == f"{tmp_path}/part-0.jsonl:3"
    assert records.where(3) == f"{tmp_path}/part-1.json:1"
    assert records.where(5) == f"{tmp_path}/part-2.parquet, row 1"
    assert pickle.loads(pickle.dumps(records))[4] == rows[4]
    with pytest.raises(UserError, match=r"part-3\.jsonl: cannot be read"):
        open_records(f"{tmp_path}/part-{{0,3}}.jsonl")


def test_one_file_is_read_by_its_own_reader(tmp_path):
    (tmp_path / "{odd}.json").write_text('[{"id": 1}]')
    assert isinstance(open_records(tmp_path / "{odd}.json"), RecordIndex)
    pq.write_table(pa.table({"caption": ["A cat."]}), tmp_path / "a.parquet")
    assert isinstance(open_records(tmp_path / "a.parquet"), ParquetRecords)


def test_compressed_tars_are_refused():
    with pytest.raises(UserError, match=r"a1\.tar\.gz: a compressed tar cannot be read"):
        data_files("a{1..2}.tar.gz")
