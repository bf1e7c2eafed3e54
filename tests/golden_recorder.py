"""How far are the tests' numbers from the golden tensors that they compare them with?

The tests run as they are, with a plugin that notes which tensors they read from golden files, and
measures every comparison with one of them (or with a view of one), however wide its tolerance.
`connector_tables.py` and `encoder_tables.py` write what comes out into the pages in docs/.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"


class Read(NamedTuple):
    """A tensor that a test has read; it is kept so that its memory is not given to another."""

    file: str
    key: str
    tensor: Tensor


@dataclass(eq=False)  # pytest wants to hash it
class Recorder:
    """Serves pytest as a plugin: the largest difference from each golden tensor compared with.

    Attributes:
        golden: golden file -> tensor's name in it -> largest absolute difference.
    """

    golden: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    _read: list[Read] = field(default_factory=list)

    def watch(self) -> None:
        """Let reading and comparing be seen; before the tests' modules take the functions."""
        safetensors.torch.load_file = self._reading(safetensors.torch.load_file)
        torch.testing.assert_close = self._comparing(torch.testing.assert_close)

    def _reading(self, load: Callable) -> Callable:
        def load_file(path: Any, *args: Any, **options: Any) -> Any:
            tensors = load(path, *args, **options)
            if Path(path).parent == GOLDEN:
                self._read += [Read(Path(path).stem, key, x) for key, x in tensors.items()]
            return tensors

        return load_file

    def _comparing(self, compare: Callable) -> Callable:
        def assert_close(actual: Any, expected: Any, **options: Any) -> None:
            compare(actual, expected, **options)
            source = self._source(expected)
            if source is not None:
                differences = self.golden[source.file]
                found = (actual.detach() - expected.detach()).abs().max().item()
                differences[source.key] = max(differences.get(source.key, 0.0), found)

        return assert_close

    def _source(self, expected: Any) -> Read | None:
        """Return the golden tensor that this is, or is a view of; None: another one, or a copy."""
        if not isinstance(expected, Tensor) or not expected.numel():
            return None
        address = expected.data_ptr()
        for read in self._read:
            begin = read.tensor.data_ptr()
            if begin <= address < begin + read.tensor.nbytes:
                return read
        return None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin a test: it has read nothing yet."""
        self._read.clear()


def run_tests(recorder: Recorder, tests: Sequence[str | Path], names: Mapping[str, str]) -> int:
    """Run tests under the recorder; return 1 if one failed or a file of `names` is not compared.

    Of a file that has gradients, one at least must be compared.
    """
    recorder.watch()
    code = pytest.main(["-p", "no:cacheprovider", *map(str, tests)], plugins=[recorder])
    missing = [name for name in names if name not in recorder.golden]
    for name, differences in recorder.golden.items():
        held = json.loads((GOLDEN / f"{name}.json").read_text())["tensors"]
        if any(map(is_gradient, held)) and not any(map(is_gradient, differences)):
            missing.append(f"{name}: gradients")
    if missing:
        print("not compared:", ", ".join(missing), file=sys.stderr)
    return int(bool(code or missing))


def golden_table(recorder: Recorder, names: Mapping[str, str], what: str) -> str:
    """Return a table with a row for each golden file.

    Args:
        recorder: has seen the tests.
        names: golden file -> what it is of, as Markdown.
        what: heading of these.
    """
    lines = [
        f"| {what} | golden file | made with | values: number, largest difference "
        "| gradients: the same |",
        "|---|---|---|---|---|",
    ]
    for file, of in names.items():
        differences = recorder.golden[file]
        gradients = set(filter(is_gradient, differences))
        cells = [of, f"`{file}`", made_with(file)]
        for keys in (differences.keys() - gradients, gradients):
            largest = f"{max(differences[key] for key in keys):.1e}" if keys else ""
            cells.append(
                f"{len(keys)}, {largest}".replace("0.0e+00", "0") if keys else "none in the file"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_gradient(key: str) -> bool:
    """Say whether a golden tensor of this name is a gradient."""
    return "grad" in key


def made_with(file: str) -> str:
    """Return the repository, or the library, whose code made a golden file."""
    notes = json.loads((GOLDEN / f"{file}.json").read_text())
    if "source_repo" in notes:
        return notes["source_repo"].removeprefix("github.com/")
    source = notes["repo"].partition(" (")[0].removeprefix("stored public copy of ")
    return source.partition(" modeling")[0].replace("+", "/", 1)
