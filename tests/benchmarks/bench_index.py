"""How long does a file of a million records take to open, and how much memory? A table.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_index.py --folder /tmp/bench_index

Writes LLaVA-like records (about 600 bytes each) once, as a JSON array, JSONL, parquet in row groups
of 1,000 and a tar (a tenth of the records, each with a picture of 3 kB). Then, each in a process of
its own: the first opening, which builds the index; a second one; 2,000 reads at random places. The
memory of opening is all that the process grew by (RSS); after the reads, what it has for itself
(anonymous), without the pages of the file that the system keeps for everybody. "order" is a
mixture's first position of an epoch over all records. Beside them, `json.load` of the same array,
which is what LLaVA does on every rank.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

TEXT = "the red cat sits on a blue mat under seven lamps and looks at one green door " * 10
READS = 2000
TAR_SHARE = 10


def record(number: int) -> dict[str, Any]:
    """Return a record with a picture and two questions, about 600 bytes."""
    turns = []
    for place in range(2):
        start = (7 * number + 50 * place) % 400
        question = ("<image>\n" if place == 0 else "") + TEXT[start : start + 50] + "?"
        answer = TEXT[start + 50 : start + 200 + number % 100]
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"{number:09d}", "image": f"coco/{number:012d}.jpg", "conversations": turns}


def write_array(path: Path, count: int) -> None:
    """Write a JSON array on one line, as LLaVA's."""
    with path.open("w") as file:
        for number in range(count):
            file.write(("[" if number == 0 else ", ") + json.dumps(record(number)))
        file.write("]")


def write_lines(path: Path, count: int) -> None:
    """Write JSONL."""
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps(record(number)) + "\n")


def write_parquet(path: Path, count: int) -> None:
    """Write parquet in row groups of 1,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pa.Table.from_pylist([record(0)]).schema) as writer:
        for start in range(0, count, 1000):
            rows = [record(number) for number in range(start, min(start + 1000, count))]
            writer.write_table(pa.Table.from_pylist(rows))


def write_tar(path: Path, count: int) -> None:
    """Write a shard of JSON and pictures; the pictures are random bytes."""
    data = random.Random(0).randbytes(3000)
    with tarfile.open(path, "w") as tar:
        for number in range(count // TAR_SHARE):
            text = json.dumps(record(number) | {"image": f"{number:09d}.jpg"}).encode()
            for suffix, content in (("jpg", data), ("json", text)):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "records.json": write_array,
    "records.jsonl": write_lines,
    "records.parquet": write_parquet,
    "records.tar": write_tar,
}


def measure(path: Path) -> dict[str, float]:
    """Return seconds and megabytes of opening a file and of reading it; wants its own process."""
    import psutil

    from data_recipes.mixture import Mixture, Source
    from data_recipes.readers import open_records

    process = psutil.Process()

    def used() -> float:
        """Return anonymous memory: pages of a mapped file are shared, and the system's to drop."""
        memory = process.memory_info()
        return (memory.rss - memory.shared) / 2**20

    held, before, started = process.memory_info().rss, used(), time.perf_counter()
    records = open_records(path)
    opened, memory = time.perf_counter(), process.memory_info().rss
    rows = random.Random(1).choices(range(len(records)), k=READS)
    first = time.perf_counter()
    for row in rows:
        records[row]
    done, after = time.perf_counter(), used()
    mixture = Mixture([Source(name="all", path=str(path))], [len(records)], seed=0)
    began = time.perf_counter()
    mixture.locate(0)
    return {
        "records": len(records),
        "open_s": opened - started,
        "open_mb": (memory - held) / 2**20,
        "read_us": (done - first) / READS * 1e6,
        "read_mb": after - before,
        "order_s": time.perf_counter() - began,
        "order_mb": used() - after,
    }


def measure_json(path: Path) -> dict[str, float]:
    """Return what `json.load` of a file costs."""
    import psutil

    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    with path.open() as file:
        rows = json.load(file)
    seconds = time.perf_counter() - started
    grown = (process.memory_info().rss - before) / 2**20
    return {"records": len(rows), "open_s": seconds, "open_mb": grown}


def apart(what: str, path: Path) -> dict[str, float]:
    """Run a measurement in a new process."""
    words = [sys.executable, __file__, "--one", what, str(path)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Write what is not there, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_index"))
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, path = args.one
        print(json.dumps({"open": measure, "json": measure_json}[what](Path(path))))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    head = ("file", "records", "index s", "open s", "open MB", "read us", "after reads MB")
    print("| " + " | ".join([*head, "order s", "order MB"]) + " |")
    for name, writer in WRITERS.items():
        path = args.folder / f"{args.records}-{name}"
        if not path.exists():
            writer(path, args.records)
        path.with_name(f".{path.name}.index").unlink(missing_ok=True)
        built, found = apart("open", path), apart("open", path)
        figures = [f"{found['records']:,.0f}", f"{built['open_s']:.2f}", f"{found['open_s']:.3f}"]
        figures += [f"{found['open_mb']:.1f}", f"{found['read_us']:.0f}", f"{found['read_mb']:.1f}"]
        figures += [f"{found['order_s']:.2f}", f"{found['order_mb']:.1f}"]
        print(f"| {name}, {path.stat().st_size >> 20} MiB | " + " | ".join(figures) + " |")
    plain = apart("json", args.folder / f"{args.records}-records.json")
    print(f"json.load: {plain['open_s']:.1f} s, {plain['open_mb']:.0f} MB")


if __name__ == "__main__":
    main()
