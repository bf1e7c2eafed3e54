"""What do the golden tests and the matrix of uses find? The tables of docs/connectors.md.

    OMP_NUM_THREADS=1 python tests/connector_tables.py            # runs both, writes the page
    OMP_NUM_THREADS=1 python tests/connector_tables.py --print    # prints the tables instead

See golden_recorder.py for how they are measured. Nothing in the tables is typed by hand but the
connectors' names.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
from golden_recorder import ROOT, Recorder, golden_table, run_tests
from marked_pages import put

MATRIX = ROOT / "tests" / "vlm" / "test_connector_matrix.py"
LAYOUT = ROOT / "tests" / "vlm" / "test_xcomposer2_layout.py"
CONNECTOR_TESTS = ROOT / "tests" / "connectors"
PAGE = ROOT / "docs" / "connectors.md"

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


@dataclass(eq=False)
class UsesRecorder(Recorder):
    """Notes which tests of the matrix pass, too.

    Attributes:
        uses: (row of the matrix, column of the table) -> whether each test passed.
    """

    uses: dict[tuple[str, str], list[bool]] = field(default_factory=lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note whether it passed."""
        match = re.search(r"test_connector_matrix\.py::test_(\w+)\[(\w+)", report.nodeid)
        if report.when == "call" and match is not None:
            name, row = match.groups()
            (use,) = (use for begin, use in USES.items() if name.startswith(begin))
            self.uses[row, use].append(report.passed)


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


def main() -> int:
    """Run the tests and write the tables; 1, and no tables, if anything failed or is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--print", dest="only_print", action="store_true", help="print the tables, leave the page"
    )
    options = parser.parse_args()
    recorder = UsesRecorder()
    golden_tests = (p for p in CONNECTOR_TESTS.glob("*.py") if "golden" in p.read_text())
    failed = run_tests(recorder, [MATRIX, LAYOUT, *sorted(golden_tests)], CONNECTORS_OF)
    chains = read_chains()
    wanted = {(row, use) for row in chains for use in USES.values()}
    if missing := sorted(wanted - set(recorder.uses)):
        print("not run:", missing, file=sys.stderr)
    if failed or missing:
        return 1
    tables = {
        "golden": golden_table(recorder, CONNECTORS_OF, "connector"),
        "uses": uses_table(recorder.uses, chains),
    }
    if options.only_print:
        print(*tables.values(), sep="\n\n")
    else:
        put(PAGE, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
