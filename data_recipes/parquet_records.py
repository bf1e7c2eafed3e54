"""How is row i of a parquet file read without reading the file? By row groups, a few of them kept.

A row's text is read with its row group. A picture or a video stored as bytes (Hugging Face's
`{bytes, path}`, or plain bytes) is read when it is wanted, and then its column alone. Of all files
of a source, a few row groups stay in memory and a few files open: the ones used last.

Reading a row costs its whole row group: some milliseconds where a group has 1,000 rows of text, or
100 with pictures. Groups that are too large for that are refused.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_recipes.image_files import Inside
from data_recipes.index import Place
from data_recipes.record_forms import KEYS, PICTURE_KEYS, TURN_KEYS, VIDEO_KEYS
from vlm.errors import UserError

KEPT_BYTES = 16 << 20  # twice as much in memory, with what Arrow's allocator holds back
KEPT_OPEN = 8  # files; parsing the footer of a file of 1,000 row groups takes 4 ms
MAX_TEXT_BYTES = 64 << 20  # of a row group, uncompressed
MAX_PICTURE_BYTES = 512 << 20


class RowGroups:
    """The columns of row groups that were read last, up to so many bytes, two at least."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self.kept_bytes = kept_bytes
        self._tables: OrderedDict[tuple, pa.Table] = OrderedDict()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()

    def open(self, path: Path) -> pq.ParquetFile:
        """Return a file, opened now or before.

        Raises:
            UserError: there is none, or it is no parquet.
        """
        if path not in self._files:
            self._files[path] = _open(path)
        self._files.move_to_end(path)
        if len(self._files) > KEPT_OPEN:
            _, oldest = self._files.popitem(last=False)
            oldest.close()
        return self._files[path]

    def get(self, key: tuple, read: Callable[[], pa.Table]) -> pa.Table:
        """Return what `read` returned for this key, if that is kept, or returns now."""
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = self._tables[key] = read()
        while len(self._tables) > 2 and self.nbytes() > self.kept_bytes:
            self._tables.popitem(last=False)
        return table

    def nbytes(self) -> int:
        """Return how much is kept."""
        return sum(table.nbytes for table in self._tables.values())


@dataclass(frozen=True)
class Column:
    """A column of pictures or of videos, as what reads one of them.

    Attributes:
        records: the file.
        leaf: the column's bytes.
        kind: what errors call what it holds.
    """

    records: "ParquetRecords"
    leaf: str
    kind: str

    def name_picture(self, key: tuple[int, int]) -> str:
        """Return what errors call picture or video `key[1]` of row `key[0]`."""
        return f"{self.records.path}, row {key[0]}, {self.kind} {key[1] + 1}"

    def read_picture(self, key: tuple[int, int]) -> bytes:
        """Return the bytes of picture or video `key[1]` of row `key[0]`.

        Raises:
            UserError: the row has none.
        """
        row, number = key
        value = self.records.value(row, [self.leaf])[self.leaf.partition(".")[0]]
        items = value if isinstance(value, list) else [value]
        found = items[number] if number < len(items) else None
        data = found.get("bytes") if isinstance(found, Mapping) else found
        if not data:
            raise UserError(f"{self.kind} {self.name_picture(key)}: it has no bytes")
        return data


class ParquetRecords:
    """Random access to the rows of a parquet file, as records.

    Args:
        path: the file.
        groups: keeps row groups in memory; files that are read together share one.
    """

    def __init__(self, path: str | Path, groups: RowGroups | None = None) -> None:
        self.path = Path(path)
        self._groups = groups or RowGroups()
        file = self._groups.open(self.path)
        metadata, schema = file.metadata, file.schema
        leaves = [schema.column(number).path for number in range(len(schema))]
        self._media = {
            leaves[number].partition(".")[0]: leaves[number]
            for number in range(len(schema))
            if _holds_media(schema.column(number)) and _has_values(metadata, number)
        }
        self._text = [
            leaf
            for leaf in leaves
            if leaf.partition(".")[0] in KEYS and leaf not in self._media.values()
        ]
        self._check(metadata, leaves)
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Any:
        """Return row `row` without its nulls; what is inside the file becomes `Inside`."""
        raw = without_nulls(self.value(row, self._text))
        for name, leaf in self._media.items():
            if name not in raw and any(known.startswith(f"{name}.") for known in self._text):
                continue  # the column that is read with the text says that there is none
            found = raw.get(name)
            if found is None:
                found = self.value(row, [leaf])[name]
            column = Column(self, leaf, "picture" if name in PICTURE_KEYS else "video")
            if isinstance(found, list):
                raw[name] = [Inside(str(self.path), (row, n), column) for n in range(len(found))]
            elif found is not None:
                raw[name] = Inside(str(self.path), (row, 0), column)
        return {
            name: _paths(value) if name in (*PICTURE_KEYS, *VIDEO_KEYS) else value
            for name, value in raw.items()
        }

    def __reduce__(self) -> tuple:
        """Reopen in another process, with nothing kept."""
        return ParquetRecords, (self.path,)

    def where(self, row: int) -> str:
        """Return file and row, counted from 0 as in every data frame."""
        return f"{self.path}, row {row}"

    def place(self, row: int) -> Place:
        """Return `where(row)` as an object that computes its text late."""
        return Place(self.where, row)

    def value(self, row: int, columns: list[str]) -> dict[str, Any]:
        """Return one row of some columns, as plain values."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        table = self._groups.get(
            (str(self.path), group, *columns), lambda: self._read(group, columns)
        )
        return table.slice(row - first, 1).to_pylist()[0]

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        """Read some columns of a row group; one thread, since data workers are many."""
        try:
            file = self._groups.open(self.path)
            return file.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: row group {group} cannot be read ({error})") from error

    def _check(self, metadata: pq.FileMetaData, leaves: list[str]) -> None:
        """Refuse files without rows or turns, and row groups too large to be read for one row."""
        if metadata.num_rows == 0:
            raise UserError(f"{self.path}: the file holds no record")
        if not {leaf.partition(".")[0] for leaf in self._text} & set(TURN_KEYS):
            columns = sorted({leaf.partition(".")[0] for leaf in leaves})
            raise UserError(
                f"{self.path}: none of its columns {', '.join(columns)} is one of "
                f"{', '.join(TURN_KEYS)}, which a record needs"
            )
        limits = [(self._text, MAX_TEXT_BYTES)]
        limits += [([leaf], MAX_PICTURE_BYTES) for leaf in self._media.values()]
        for columns, limit in limits:
            numbers = [leaves.index(name) for name in columns]
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                size = sum(group.column(n).total_uncompressed_size for n in numbers)
                if size > limit:
                    raise UserError(
                        f"{self.path}: a row group has {size >> 20} MiB in the columns "
                        f"{', '.join(columns)}, which reading one row would have to read (at most "
                        f"{limit >> 20}); `vlm data regroup` writes the file with smaller groups"
                    )


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read (no such file)") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no readable parquet file ({error})") from error


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null: a column's rows all have the same keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _holds_media(column: pq.ColumnSchema) -> bool:
    """Return whether a leaf column is the bytes of pictures or of videos."""
    binary = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
    return binary and column.path.partition(".")[0] in (*PICTURE_KEYS, *VIDEO_KEYS)


def _has_values(metadata: pq.FileMetaData, column: int) -> bool:
    """Return whether a leaf column has, or may have, a value that is not null."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunk = group.column(column)
        counts = chunk.statistics
        if counts is None or not counts.has_null_count or counts.null_count < chunk.num_values:
            return True
    return False


def _paths(value: Any) -> Any:
    """Return the paths of `{path}` structs; anything else as it is."""
    if isinstance(value, list):
        return [_paths(item) for item in value]
    return value["path"] if isinstance(value, Mapping) and set(value) == {"path"} else value
