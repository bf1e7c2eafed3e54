"""CV-Bench: what are its questions, and what is its score?

Data: nyu-visionx/CV-Bench, `test_2d.parquet` and `test_3d.parquet`, or any parquet with its
columns. Score (Tong et al. 2024, Cambrian-1, section 3.2): accuracy per source, the mean of ADE20K
and COCO is 2D, Omni3D is 3D, and the mean of both is CV-Bench. It is not the accuracy over all
questions, which other harnesses print under the same name; both are reported, each with its
formula.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from eval.parquet_rows import ParquetRows
from eval.task import DataFile, Example, Formula, Task
from vlm.answers import LETTERS
from vlm.errors import UserError
from vlm.images import load_image

COLUMNS = ("type", "task", "source", "choices", "answer", "prompt")
# Rows of the published files, revision bc284db5.
PUBLISHED_TASKS = {
    "2D": {"Relation": 650, "Count": 788},
    "3D": {"Depth": 600, "Distance": 600},
}
PUBLISHED_SOURCES = {"2D": {"ADE20K": 633, "COCO": 805}, "3D": {"Omni3D": 1200}}
PUBLISHED_SHA256 = {"2D": "33196034ef4b", "3D": "ef91fe8b5392"}  # first digits

PUBLISHED_NAMES = {"CV-Bench": ("2D", "3D"), "CV-Bench 2D": ("2D",), "CV-Bench 3D": ("3D",)}


class CvBench(Task):
    """Relation, Count, Depth and Distance questions in CV-Bench's own schema."""

    name: ClassVar[str] = "cv_bench"
    summary: ClassVar[str] = "CV-Bench 2D and 3D, or any parquet in its schema"
    breakdowns: ClassVar[tuple[str, ...]] = ("task", "source")
    shown: ClassVar[str] = "image"  # the column of what a question is about

    def __init__(self, tables: Sequence[ParquetRows], files: Sequence[DataFile]) -> None:
        self.files = tuple(files)
        self._tables = list(tables)
        self._place = [(table, row) for table in tables for row in range(len(table.rows))]
        self._examples = [
            _example(index, table, row) for index, (table, row) in enumerate(self._place)
        ]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "CvBench":
        """Return the task on these parquet files, in the order given."""
        if not paths:
            raise UserError(
                "cv_bench needs its questions: --data test_2d.parquet test_3d.parquet "
                "(from nyu-visionx/CV-Bench), or a parquet built in the same schema"
            )
        tables = [ParquetRows(path, light=COLUMNS, heavy=cls.shown) for path in paths]
        files = [
            DataFile(path=str(table.path), rows=len(table.rows), sha256=_sha256(table.path))
            for table in tables
        ]
        if not any(table.rows for table in tables):
            raise UserError(f"no questions in {', '.join(map(str, paths))}")
        return cls(tables, files)

    @property
    def num_examples(self) -> int:
        """Number of questions in all files."""
        return len(self._examples)

    def get_example(self, index: int) -> Example:
        """Return one question."""
        return self._examples[index]

    def stored(self, index: int) -> tuple[Any, str, ParquetRows]:
        """Return what the column `shown` holds of a question, what errors call it, and its file."""
        table, row = self._place[index]
        return table.heavy(row), self.where(index), table

    def where(self, index: int) -> str:
        """Return the question's file and row."""
        table, row = self._place[index]
        return f"{table.path}, row {row}"

    def images(self, index: int) -> list[Image.Image]:
        """Return the question's one picture."""
        stored, where, table = self.stored(index)
        if not isinstance(stored, dict) or not (stored.get("bytes") or stored.get("path")):
            raise UserError(f"{where}: no picture; the image column needs {{bytes, path}}")
        source = stored["bytes"] or table.path.parent / stored["path"]
        return [load_image(source, name=where)]

    def label(self, indices: Sequence[int]) -> str:
        """Return "CV-Bench" only for the published files, whole and unchanged."""
        examples = [self._examples[i] for i in indices]
        tasks = dict(Counter(e.groups["task"] for e in examples))
        sources = dict(Counter(e.groups["source"] for e in examples))
        for name, parts in PUBLISHED_NAMES.items():
            expected_tasks = {k: v for part in parts for k, v in PUBLISHED_TASKS[part].items()}
            expected_sources = {k: v for part in parts for k, v in PUBLISHED_SOURCES[part].items()}
            if tasks == expected_tasks and sources == expected_sources:
                digests = {file.sha256[:12] for file in self.files}
                if digests == {PUBLISHED_SHA256[part] for part in parts}:
                    return name
                return f"{name}'s question counts, other bytes than the published files"
        if len(examples) < self.num_examples:
            return (
                f"CV-Bench schema, {len(examples)} of {self.num_examples} questions; "
                "a subset, not the benchmark"
            )
        return f"CV-Bench schema, n={len(examples)}; not the published files"

    def formulas(self, examples: Sequence[Example]) -> list[Formula]:
        """Return the official score where its three sources are there, and the plain ones."""
        sources = {example.groups["source"] for example in examples}
        tasks = sorted({example.groups["task"] for example in examples})
        found: list[Formula] = []
        if sources >= {"ADE20K", "COCO", "Omni3D"}:
            weights = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}
            text = "((ADE20K + COCO)/2 + Omni3D)/2"
            found.append(Formula(name="official", text=text, by="source", weights=weights))
        if sources >= {"ADE20K", "COCO"}:
            weights = {"ADE20K": 0.5, "COCO": 0.5}
            found.append(Formula(name="2D", text="(ADE20K + COCO)/2", by="source", weights=weights))
        if "Omni3D" in sources:
            found.append(Formula(name="3D", text="Omni3D", by="source", weights={"Omni3D": 1.0}))
        found.append(
            Formula(
                name="task_mean",
                text=f"({' + '.join(tasks)})/{len(tasks)}",
                by="task",
                weights={task: 1 / len(tasks) for task in tasks},
            )
        )
        found.append(Formula(name="pooled", text="right answers / questions"))
        return found


def _example(index: int, table: ParquetRows, row: int) -> Example:
    """Return one checked row."""
    raw: dict[str, Any] = table.rows[row]
    where = f"{table.path}, row {row}"
    for name in ("type", "task", "source", "answer", "prompt"):
        if not isinstance(raw[name], str) or not raw[name].strip():
            raise UserError(f"{where}: column {name} holds {raw[name]!r}, expected text")
    choices = raw["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: choices is {choices!r}, expected a list of 2 or more options")
    letter = raw["answer"].strip().strip("()").upper()
    if letter not in tuple(LETTERS[: len(choices)]):
        raise UserError(
            f"{where}: answer {raw['answer']!r} is none of the {len(choices)} options' letters"
        )
    return Example(
        index=index,
        prompt=raw["prompt"],
        choices=tuple(map(str, choices)),
        answer=letter,
        groups={name: raw[name] for name in ("type", "task", "source")},
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
