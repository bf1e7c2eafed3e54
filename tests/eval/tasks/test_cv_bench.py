"""Does CV-Bench read its own schema, call itself by its right name, and sum up by its formula?"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from connectors.registry import lookup
from eval.protocols import CAMBRIAN, OFFICIAL
from eval.tasks import TASKS
from eval.tasks.cv_bench import CvBench
from vlm.errors import UserError


def row(task: str, source: str, **changes):
    kind = "3D" if source == "Omni3D" else "2D"
    base = {
        "type": kind,
        "task": task,
        "source": source,
        "choices": ["yes", "no"],
        "answer": "(A)",
        "prompt": "?",
        "image": {"bytes": b"", "path": None},
    }
    return base | changes


def save(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def published_2d() -> list[dict]:
    pairs = [("Relation", "ADE20K")] * 633 + [("Relation", "COCO")] * 17 + [("Count", "COCO")] * 788
    return [row(*pair) for pair in pairs]


def published_3d() -> list[dict]:
    return [row(task, "Omni3D") for task in ["Depth"] * 600 + ["Distance"] * 600]


def test_reads_questions_pictures_and_letters(tmp_path, write_benchmark):
    task = CvBench.open([write_benchmark(tmp_path / "a.parquet", 3)])
    assert task.num_examples == 12
    example = task.get_example(4)
    assert example.groups["task"] == "Count" and example.prompt.startswith("Count 4?")
    assert example.answer in "ABCDEF" and 4 <= len(example.choices) <= 6
    (picture,) = task.images(4)
    assert picture.size == (24, 20) and picture.mode == "RGB"
    assert task.files[0].rows == 12 and len(task.files[0].sha256) == 64


def test_prompt_is_verbatim_and_blind_only_drops_the_picture(tmp_path, write_benchmark):
    task = CvBench.open([write_benchmark(tmp_path / "a.parquet", 1)])
    example = task.get_example(0)
    (seen,) = task.prompt(example, OFFICIAL, blind=False)
    (blind,) = task.prompt(example, OFFICIAL, blind=True)
    assert [part["type"] for part in seen["content"]] == ["image", "text"]
    assert blind["content"] == seen["content"][1:] == [{"type": "text", "text": example.prompt}]
    (asked,) = task.prompt(example, CAMBRIAN, blind=True)
    assert asked["content"][0]["text"] == (
        example.prompt + "\nAnswer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize("row_group_size", [1, 7, 40, 1000])
def test_pictures_in_any_order(tmp_path, write_benchmark, row_group_size: int):
    paths = [
        write_benchmark(tmp_path / "a.parquet", 20, row_group_size),
        write_benchmark(tmp_path / "b.parquet", 2, seed=1),
    ]
    task = CvBench.open(paths)
    stored = [
        value["bytes"] for path in paths for value in pq.read_table(path)["image"].to_pylist()
    ]
    for index in [0, 1, 50, 49, 79, 80, 87, 3, 33, 32, 64, 0]:
        table, place = task._place[index]
        assert table.heavy(place)["bytes"] == stored[index]


def test_pictures_are_streamed_once_in_rising_order(tmp_path, write_benchmark, monkeypatch):
    task = CvBench.open([write_benchmark(tmp_path / "a.parquet", 60, row_group_size=50)])
    table, _ = task._place[0]
    starts: list[int] = []
    read = table._read_from
    monkeypatch.setattr(table, "_read_from", lambda row: starts.append(row) or read(row))
    for index in range(task.num_examples):
        task.images(index)
    assert starts == [0]
    table.heavy(5)
    table.heavy(235)  # row groups between are skipped, not decoded
    assert starts == [0, 5, 235]


def test_picture_beside_the_file(tmp_path, write_benchmark):
    from PIL import Image

    Image.new("RGB", (9, 8)).save(tmp_path / "x.png")
    path = save(
        tmp_path / "a.parquet", [row("Depth", "Omni3D", image={"bytes": None, "path": "x.png"})]
    )
    assert CvBench.open([path]).images(0)[0].size == (9, 8)


def test_only_the_published_counts_and_bytes_are_cv_bench(tmp_path, monkeypatch):
    both = [
        save(tmp_path / "test_2d.parquet", published_2d()),
        save(tmp_path / "test_3d.parquet", published_3d()),
    ]
    task = CvBench.open(both)
    everything = range(task.num_examples)
    assert (
        task.label(everything) == "CV-Bench's question counts, other bytes than the published files"
    )
    digests = {part: file.sha256[:12] for part, file in zip(("2D", "3D"), task.files, strict=True)}
    monkeypatch.setattr("eval.tasks.cv_bench.PUBLISHED_SHA256", digests)
    assert task.label(everything) == "CV-Bench"
    assert CvBench.open(both[:1]).label(range(1438)) == "CV-Bench 2D"
    assert CvBench.open(both[1:]).label(range(1200)) == "CV-Bench 3D"
    assert task.label(range(2637)) == (
        "CV-Bench schema, 2637 of 2638 questions; a subset, not the benchmark"
    )


def test_another_data_set_is_not_called_cv_bench(tmp_path, write_benchmark):
    task = CvBench.open([write_benchmark(tmp_path / "scenes.parquet", 5)])
    assert task.label(range(20)) == "CV-Bench schema, n=20; not the published files"


def test_official_formula_only_where_its_sources_are(tmp_path):
    def names(rows: list[dict]) -> list[str]:
        task = CvBench.open([save(tmp_path / "a.parquet", rows)])
        return [f.name for f in task.formulas([task.get_example(i) for i in range(len(rows))])]

    ade, coco = row("Count", "ADE20K"), row("Relation", "COCO")
    omni, scene = row("Depth", "Omni3D"), row("Depth", "Scenes")
    assert names([ade, coco, omni]) == ["official", "2D", "3D", "task_mean", "pooled"]
    assert names([ade, coco]) == ["2D", "task_mean", "pooled"]
    assert names([omni]) == ["3D", "task_mean", "pooled"]
    assert names([ade, omni]) == ["3D", "task_mean", "pooled"]
    assert names([scene, scene | {"task": "Count"}]) == ["task_mean", "pooled"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "(C)"}, "row 1: answer '(C)' is none of the 2 options' letters"),
        ({"answer": "yes"}, "row 1: answer 'yes' is none of the 2 options' letters"),
        ({"answer": None}, "row 1: column answer holds None, expected text"),
        ({"choices": ["one"]}, "row 1: choices is ['one'], expected a list of 2 or more options"),
        ({"prompt": " "}, "row 1: column prompt holds ' ', expected text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes: dict, message: str):
    path = save(
        tmp_path / "bad.parquet", [row("Depth", "Omni3D"), row("Depth", "Omni3D", **changes)]
    )
    with pytest.raises(UserError) as caught:
        CvBench.open([path])
    assert str(caught.value) == f"{path}, {message}"


def test_a_broken_picture_is_named(tmp_path):
    broken = row("Depth", "Omni3D", image={"bytes": b"\x89PNG nothing", "path": None})
    path = save(tmp_path / "bad.parquet", [broken, row("Depth", "Omni3D")])
    task = CvBench.open([path])
    with pytest.raises(UserError, match=r"bad\.parquet, row 0"):
        task.images(0)
    with pytest.raises(UserError, match=r"bad\.parquet, row 1: no picture"):
        task.images(1)


def test_bad_files_are_one_sentence(tmp_path):
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    other = save(tmp_path / "other.parquet", [{"question": "?", "image": "x"}])
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist([row("Depth", "Omni3D")]).slice(0, 0), empty)
    for paths, message in [
        ([], "cv_bench needs its questions: --data"),
        ([tmp_path / "none.parquet"], "no data file at"),
        ([tmp_path], "no data file at"),
        ([text], "is no readable parquet file"),
        ([other], "lacks the columns type, task, source, choices, answer, prompt; it has question"),
        ([empty], "no questions in"),
    ]:
        with pytest.raises(UserError, match=message):
            CvBench.open(paths)


def test_unknown_task_lists_the_known():
    with pytest.raises(UserError, match=r"unknown task 'cv_bensh' \(did you mean 'cv_bench'\?\)"):
        lookup("task", "cv_bensh", TASKS, "vlm.tasks")
