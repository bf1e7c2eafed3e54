"""Does the index find every record of any JSON array or JSONL file, and notice when it changes?"""

import json
import multiprocessing
import os
import pickle
import random
import string

import numpy as np
import pytest

from data_recipes import index as index_module
from data_recipes.index import RecordIndex, fingerprint, load_or_build
from data_recipes.scan import scan
from vlm.errors import UserError

NASTY = ['"', "\\", "{", "}", "[", "]", ",", "\n", "é", "😀", "\\\\", '\\"', " ", "a", ":"]


def nasty_rows(seed, count=20):
    rng = random.Random(seed)

    def text():
        return "".join(rng.choice(NASTY) for _ in range(rng.randrange(12)))

    return [
        {"id": i, text(): text(), "deep": [{"a": [text(), {}]}, {text(): {"b": text()}}]}
        for i in range(count)
    ]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_array_scan_agrees_with_json(tmp_path, indent, chunk):
    rows = nasty_rows(chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=chunk % 2 == 0), encoding="utf-8")
    found = scan(path, chunk_bytes=chunk)
    data = path.read_bytes()
    pieces = [data[a:b] for a, b in zip(found.offsets, found.offsets[1:], strict=False)]
    decoded = [json.JSONDecoder().raw_decode(piece.decode())[0] for piece in pieces]
    assert decoded == rows


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n  \n"])
def test_lines_with_blanks_between(tmp_path, bom, ending):
    rows = nasty_rows(1)
    path = tmp_path / "a.jsonl"
    text = "\n".join(json.dumps(row) for row in rows[:5]) + "\n\n \t\n"
    text += "\r\n".join(json.dumps(row) for row in rows[5:]) + ending
    path.write_bytes(bom + text.encode())
    index = RecordIndex(path)
    assert [index[i] for i in range(len(index))] == rows
    assert index.where(4) == f"{path}:5"
    assert index.where(5) == f"{path}:8"


def test_where_in_an_indented_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1}, {"id": 2}], indent=1))
    assert RecordIndex(path).where(1) == f"{path}:5"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        (" \n ", "holds no record"),
        ("[]", "holds no record"),
        ('[{"a": 1}, {"a": 2}', "does not end"),
        ('[{"a": "x', "does not end"),
        ('[{"a": 1}, 5]', "1 object(s) and 1 comma(s)"),
        ('[{"a": 1} {"a": 2}]', "2 object(s) and 0 comma(s)"),
        ('[{"a": 1},]', "1 object(s) and 1 comma(s)"),
    ],
)
def test_files_that_are_no_data(tmp_path, text, sentence):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json") as error:
        RecordIndex(path)
    assert sentence in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        RecordIndex(tmp_path / "gone.json")


def test_broken_line_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id": 2\n{"id": 3} x\n{"id": 4}\n')
    index = RecordIndex(path)
    assert index[3] == {"id": 4}
    with pytest.raises(UserError, match=r"a\.jsonl:2: broken JSON"):
        index[1]
    with pytest.raises(UserError, match=r"a\.jsonl:3: broken JSON \(text after the record: 'x'\)"):
        index[2]


def write_lines(path, count):
    path.write_text("".join(json.dumps({"id": i}) + "\n" for i in range(count)))


def test_cache_is_used_and_dropped_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_lines(path, 5)
    assert len(RecordIndex(path)) == 5
    monkeypatch.setattr(index_module, "scan", lambda _: pytest.fail("scanned again"))
    assert RecordIndex(path)[4] == {"id": 4}
    monkeypatch.undo()
    write_lines(path, 6)
    assert len(RecordIndex(path)) == 6
    before = path.stat()
    path.write_text(path.read_text().replace('{"id": 0}', '{"i": 10}'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    monkeypatch.setattr(index_module, "scan", lambda p: scan(p))
    assert RecordIndex(path)[0] == {"i": 10}


def test_fingerprint_sees_both_ends_of_a_large_file(tmp_path):
    path = tmp_path / "a.jsonl"
    data = bytearray(b"x" * 300_000)
    found = set()
    for position in (None, 0, 299_999):
        changed = bytearray(data)
        if position is not None:
            changed[position] = ord("y")
        path.write_bytes(changed)
        os.utime(path, ns=(1, 1))
        found.add(fingerprint(path))
    assert len(found) == 3


def test_damaged_cache_is_rebuilt(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, 5)
    RecordIndex(path)
    cache = tmp_path / ".a.jsonl.index"
    for damaged in (b"", b"nonsense", cache.read_bytes()[:-3], cache.read_bytes()[:-16]):
        cache.write_bytes(damaged)
        assert [RecordIndex(path)[i]["id"] for i in range(5)] == list(range(5))


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_lines(path, 5)
    real = index_module.tempfile.NamedTemporaryFile

    def refuse(dir, **kwargs):  # noqa: A002
        if dir == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir, **kwargs)

    monkeypatch.setattr(index_module.tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert RecordIndex(path)[3] == {"id": 3}
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert RecordIndex(path)[3] == {"id": 3}  # in memory
    assert not list(tmp_path.glob(".a*"))


def build(path):
    return load_or_build(path, scan).offsets.tolist()


def test_two_processes_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, 2000)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(build, [path] * 8)
    assert all(result == results[0] for result in results)
    assert [p.name for p in tmp_path.glob(".a*")] == [".a.jsonl.index"]


def test_eight_bytes_a_record_and_no_record_in_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, 1000)
    index = RecordIndex(path)
    assert (tmp_path / ".a.jsonl.index").stat().st_size == 64 + 8 * 1001
    assert isinstance(RecordIndex(path)._offsets, np.memmap)
    assert pickle.loads(pickle.dumps(index))[999] == {"id": 999}
    assert set(vars(index)) == {"path", "_bytes", "_offsets", "_one_per_line"}


def test_long_strings_across_chunks(tmp_path):
    text = string.printable * 200
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"t": text}, {"t": text * 2}]))
    for chunk in (97, 1000, 4096):
        assert len(scan(path, chunk_bytes=chunk).offsets) == 3
