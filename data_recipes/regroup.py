"""Write a parquet file again in smaller row groups, so that one row can be read without many.

    vlm data regroup train.parquet small.parquet --rows 100

Rows, columns and their order stay as they are; memory is that of one new row group, and of what the
old file makes its reader hold.
"""

import argparse
from pathlib import Path

from vlm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to read, what to write, and how many rows stand together."""
    parser.add_argument("file", metavar="PARQUET", help="a parquet file")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--rows", type=int, default=100, help="rows of a group (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the file beside its place and move it there when it is whole."""
    if args.rows < 1:
        raise UserError(f"--rows must be 1 or more, not {args.rows}")
    count = regroup(Path(args.file), Path(args.out), args.rows)
    print(f"{args.out}: {count} rows, {args.rows} in a group")
    return 0


def regroup(source: Path, target: Path, rows: int) -> int:
    """Copy a parquet file with so many rows in a group; return how many rows there are.

    Raises:
        UserError: a file cannot be read or written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if target.exists():
        raise UserError(f"{target}: is there already; choose another name")
    part = target.with_name(f".{target.name}.part")
    try:
        with (
            pq.ParquetFile(source, memory_map=True, pre_buffer=False) as file,
            pq.ParquetWriter(part, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(rows):
                writer.write_batch(batch, row_group_size=rows)
            count = file.metadata.num_rows
        part.replace(target)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} cannot be written to {target} ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return count
