"""How are a parquet file's rows read without loading its pictures into memory?

Light columns are read at once. The heavy column (the pictures) is streamed in small batches, so a
400 MB file costs a few megabytes; asking in rising order reads every page once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm.errors import UserError

HEAVY_BATCH = 32  # rows of the heavy column decoded at a time


class ParquetRows:
    """One parquet file: light columns in memory, one heavy column on demand.

    Raises:
        UserError: the file is missing, is no parquet, or lacks one of the columns.
    """

    def __init__(self, path: Path, light: Sequence[str], heavy: str) -> None:
        if not path.is_file():
            raise UserError(f"no data file at {path}; give an existing parquet with --data")
        try:
            self._file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        except (pa.ArrowInvalid, pa.ArrowIOError) as error:
            raise UserError(f"{path} is no readable parquet file: {error}") from error
        missing = [name for name in (*light, heavy) if name not in self._file.schema_arrow.names]
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(missing)}; "
                f"it has {', '.join(self._file.schema_arrow.names)}"
            )
        self.path = path
        self.rows: list[dict[str, Any]] = self._file.read(columns=list(light)).to_pylist()
        self._heavy = heavy
        sizes = [
            self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)
        ]
        self._starts = [sum(sizes[:group]) for group in range(len(sizes))]
        self._stream: Iterator[tuple[int, list[Any]]] = iter(())
        self._batch: tuple[int, list[Any]] = (0, [])  # first row of the batch, its values

    def heavy(self, row: int) -> Any:
        """Return the heavy column's value in one row."""
        assert 0 <= row < len(self.rows), f"row {row} of {len(self.rows)}"
        first, values = self._batch
        if row < first or not values:
            self._stream = self._read_from(row)
            first, values = next(self._stream)
        group_ahead = max(start for start in self._starts if start <= row)
        if group_ahead > first + len(values):  # whole row groups lie between: skip them unread
            self._stream = self._read_from(row)
            first, values = next(self._stream)
        while row >= first + len(values):
            first, values = next(self._stream)
        self._batch = (first, values)
        return values[row - first]

    def _read_from(self, row: int) -> Iterator[tuple[int, list[Any]]]:
        """Yield (first row, values) batches, from the row group that holds `row` to the end."""
        group = max(g for g, start in enumerate(self._starts) if start <= row)
        first = self._starts[group]
        groups = list(range(group, len(self._starts)))
        for batch in self._file.iter_batches(HEAVY_BATCH, groups, columns=[self._heavy]):
            yield first, batch.column(0).to_pylist()
            first += batch.num_rows
