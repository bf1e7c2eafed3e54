"""What do the golden tests and the matrix of uses find? The tables of docs/connectors.md.

    OMP_NUM_THREADS=1 python tests/connector_tables.py            # runs both, writes the page
    OMP_NUM_THREADS=1 python tests/connector_tables.py --print    # prints the tables instead

The tests are run as they are; every comparison that they make in a test which has read a golden
file is measured on the way. Nothing in the tables is typed by hand but the connectors' names.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
MATRIX = ROOT / "tests" / "vlm" / "test_connector_matrix.py"
LAYOUT = ROOT / "tests" / "vlm" / "test_xcomposer2_layout.py"
CONNECTOR_TESTS = ROOT / "tests" / "connectors"
PAGE = ROOT / "docs" / "connectors.md"
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4

# Golden file -> connectors that it is of.
CONNECTORS_OF = {
    "llava_mlp": "`linear`, `mlp`",
    "internvl_pixel_shuffle": "`pixel_shuffle` (v1, v2)",
    "idefics3_pixel_shuffle": "`pixel_shuffle` (linear)",
    "qwen2vl_merger": "`qwen2vl_merger`",
    "blip2_qformer": "`qformer`, stage 2",
    "lavis_qformer_stage1": "`qformer`, stage 1",
    "openflamingo_perceiver": "`perceiver`",
    "openflamingo_gated_xattn": "`gated_cross_attention`",
    "idefics2_perceiver": "`idefics2_perceiver`",
    "minicpm_resampler": "`minicpm_resampler` (2.0)",
    "qwen_vl_adapter": "`qwen_vl`",
    "sva": "`sva`, joint",
    "sva_sep": "`sva`, separate",
    "sva_connector_e2e": "`sva`, `sva_in_llm`",
    "plora": "`partial_lora`",
    "ixc2_4khd_merge": "`pixel_shuffle`, tiling `hd`",
    "cogvlm_expert_layer": "`visual_expert`",
    "cogagent_cross_attn": "`high_resolution_cross_attention`",
    "minigemini_mining": "`minigemini`",
    "fuyu_patch": "`fuyu`",
    "kan_linear": "`kan`",
}

# Beginning of a test's name in the matrix -> column. Several may share one.
USES = {
    "training": "training",
    "cached_generation": "generation",
    "each_step_with_a_cache": "generation",
    "beams": "beams",
    "packed": "packing",
    "gradient_checkpointing": "checkpointing",
    "peft": "PEFT",
    "saved": "saving",
}


@dataclass
class Largest:
    """The largest differences of the comparisons with one golden file, and how many there were."""

    values: float = 0.0
    gradients: float = 0.0
    num_values: int = 0
    num_gradients: int = 0


@dataclass(eq=False)  # pytest wants to hash it
class Recorder:
    """Serves pytest as a plugin: notes what golden tests compare and which tests pass."""

    golden: dict[str, Largest] = field(default_factory=lambda: defaultdict(Largest))
    uses: dict[tuple[str, str], list[bool]] = field(default_factory=lambda: defaultdict(list))
    _read: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Let reading and comparing be seen; before the tests' modules take the functions."""
        safetensors.torch.load_file = self._reading(safetensors.torch.load_file)
        torch.testing.assert_close = self._comparing(torch.testing.assert_close)

    def _reading(self, load: Callable) -> Callable:
        def load_file(path: Any, *args: Any, **options: Any) -> Any:
            if Path(path).parent == GOLDEN:
                self._read.add(Path(path).stem)
            return load(path, *args, **options)

        return load_file

    def _comparing(self, compare: Callable) -> Callable:
        def assert_close(actual: Any, expected: Any, **options: Any) -> None:
            compare(actual, expected, **options)
            bound = options.get("atol")
            if options.get("rtol") != 0 or bound not in (VALUE_TOLERANCE, GRADIENT_TOLERANCE):
                return
            difference = (actual - expected).abs().max().item() if actual.numel() else 0.0
            for name in self._read:
                found = self.golden[name]
                if bound == VALUE_TOLERANCE:
                    found.values = max(found.values, difference)
                    found.num_values += 1
                else:
                    found.gradients = max(found.gradients, difference)
                    found.num_gradients += 1

        return assert_close

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin a test: it has read nothing yet."""
        self._read.clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note whether it passed."""
        match = re.search(r"test_connector_matrix\.py::test_(\w+)\[(\w+)", report.nodeid)
        if report.when == "call" and match is not None:
            name, row = match.groups()
            (use,) = (use for begin, use in USES.items() if name.startswith(begin))
            self.uses[row, use].append(report.passed)


def golden_table(golden: Mapping[str, Largest]) -> str:
    """Return the table of golden files."""
    lines = [
        "| connector | golden file | made with | values: number, largest difference "
        "| gradients: the same |",
        "|---|---|---|---|---|",
    ]
    for name, connectors in CONNECTORS_OF.items():
        found = golden[name]
        source = json.loads((GOLDEN / f"{name}.json").read_text())["repo"].partition(" (")[0]
        source = source.removeprefix("stored public copy of ").partition(" modeling")[0]
        cells = [connectors, f"`{name}`", source.replace("+", "/", 1)]
        for count, largest in (
            (found.num_values, found.values),
            (found.num_gradients, found.gradients),
        ):
            cells.append(
                f"{count}, {largest:.1e}".replace("0.0e+00", "0") if count else "none in the file"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def uses_table(uses: Mapping[tuple[str, str], list[bool]], chains: Mapping[str, Any]) -> str:
    """Return the table of rows of the matrix and uses."""
    columns = list(dict.fromkeys(USES.values()))
    lines = [f"| connectors | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, chain in sorted(chains.items(), key=lambda item: isinstance(item[1], list)):
        parts = [part["type"] for part in (chain if isinstance(chain, list) else [chain])]
        name = ", ".join(f"`{part}`" for part in parts)
        name += f" ({row})" if row not in parts else ""
        cells = ["yes" if all(uses[row, use]) else "**no**" for use in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_chains() -> dict[str, Any]:
    """Return the rows of the matrix."""
    spec = spec_from_file_location("matrix", MATRIX)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CHAINS


def put(page: str, marker: str, table: str) -> str:
    """Return the page with the table between its markers."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, _, rest = page.partition(begin)
    assert end in rest, f"{PAGE} has no {begin} ... {end}"
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """Run the tests and write the tables; 1, and no tables, if anything failed or is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--print", dest="only_print", action="store_true", help="print the tables, leave the page"
    )
    options = parser.parse_args()
    recorder = Recorder()
    recorder.watch()
    files = [
        MATRIX,
        LAYOUT,
        *sorted(p for p in CONNECTOR_TESTS.glob("*.py") if "golden" in p.read_text()),
    ]
    code = pytest.main(["-p", "no:cacheprovider", *map(str, files)], plugins=[recorder])
    chains = read_chains()
    missing = set(CONNECTORS_OF) - set(recorder.golden)
    missing |= {f"{row}: {use}" for row in chains for use in USES.values()} - {
        f"{row}: {use}" for row, use in recorder.uses
    }
    if missing:
        print("not compared, or not run:", ", ".join(sorted(missing)), file=sys.stderr)
    if code or missing:
        return 1
    tables = {
        "golden": golden_table(recorder.golden),
        "uses": uses_table(recorder.uses, chains),
    }
    if options.only_print:
        print(*tables.values(), sep="\n\n")
        return 0
    page = PAGE.read_text()
    for marker, table in tables.items():
        page = put(page, marker, table)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
