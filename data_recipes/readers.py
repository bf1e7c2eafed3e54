"""Which reader do a source's files need, and how are several files one list of records?

By the end of the name: `.parquet`, `.tar` (WebDataset); anything else is a JSON array or JSONL. A
path with braces, `part-{000..099}.tar` or `{a,b}.json`, is as many files, in the order they are
written. Missing files are faults, so what is on the disk does not decide what is read.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from data_recipes.index import Place, RecordIndex
from data_recipes.parquet_records import ParquetRecords, RowGroups
from data_recipes.tar_records import TarRecords
from vlm.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Records(Protocol):
    """The records of one or several files, one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any:
        """Return record `row` as written, decoded.

        Raises:
            UserError: it cannot be decoded; the sentence names file and line.
        """
        ...

    def where(self, row: int) -> str:
        """Return file and line, or row, or key, of a record."""
        ...

    def place(self, row: int) -> Place:
        """Return `where(row)` as an object that computes its text late."""
        ...


class Joined:
    """The records of several files, one file after the other."""

    def __init__(self, parts: list[Records]) -> None:
        self.parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Any:
        part, row = self._find(row)
        return part[row]

    def where(self, row: int) -> str:
        """Return where a record stands in its own file."""
        part, row = self._find(row)
        return part.where(row)

    def place(self, row: int) -> Place:
        """Return `where(row)` as an object that computes its text late."""
        part, row = self._find(row)
        return part.place(row)

    def _find(self, row: int) -> tuple[Records, int]:
        """Return the part that has a record, and the record's row in it."""
        number = bisect_right(self._ends, row)
        return self.parts[number], row - (self._ends[number - 1] if number else 0)


def open_records(path: str | Path) -> Records:
    """Open a file of records, or the files that a path with braces names.

    Raises:
        UserError: a file is missing or holds no records.
    """
    groups = RowGroups()  # parquet files of one source share what they keep in memory
    readers: dict[str, Callable[[Path], Records]] = {
        ".tar": TarRecords,
        ".parquet": lambda file: ParquetRecords(file, groups),
    }
    parts = [readers.get(file.suffix, RecordIndex)(file) for file in data_files(path)]
    return parts[0] if len(parts) == 1 else Joined(parts)


def data_files(path: str | Path) -> list[Path]:
    """Return the files that a path names: itself, or what its braces expand to.

    Raises:
        UserError: a tar is compressed, so that its members cannot be found without reading all.
    """
    whole = Path(path)
    files = [whole] if whole.exists() else [Path(name) for name in expand(str(path))]
    for file in files:
        if file.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            raise UserError(f"{file}: a compressed tar cannot be read from its middle; unpack it")
    return files


def expand(text: str) -> Iterator[str]:
    """Yield a text once for each choice of its braces, as a shell does, the last varying fastest.

    >>> list(expand("a{00..02}.tar")), list(expand("{x,y}.json"))
    (['a00.tar', 'a01.tar', 'a02.tar'], ['x.json', 'y.json'])
    """
    braces = BRACES.search(text)
    if braces is None:
        yield text
        return
    bounds = RANGE.fullmatch(braces[1])
    if bounds:
        first, last = bounds.groups()
        choices = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        choices = braces[1].split(",")
    for choice in choices:
        for rest in expand(text[braces.end() :]):
            yield text[: braces.start()] + choice + rest
