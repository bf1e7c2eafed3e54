"""How does the comparison look as a table? Markdown for people, CSV with unrounded figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import markdown_table, percent

Json = Mapping[str, Any]

COSTS = {
    "visual tokens": ("visual_tokens", 1.0, "{:.4g}"),
    "connector, M": ("parameters_connector", 1e6, "{:.3f}"),
    "all, M": ("parameters", 1e6, "{:.3f}"),
    "connector, MFLOP": ("flops_connector", 1e6, "{:.1f}"),
    "language model, MFLOP": ("flops_language_model", 1e6, "{:.1f}"),
    "look, ms": ("look_ms", 1.0, "{:.1f}"),
    "prefill, ms": ("prefill_ms", 1.0, "{:.1f}"),
    "prefill, MB": ("prefill_peak_mb", 1.0, "{:.1f}"),
    "training, MB": ("training_peak_mb", 1.0, "{:.0f}"),
    "training, s": ("training_seconds", 1.0, "{:.0f}"),
}


def interval(entry: Json, name: str = "accuracy") -> str:
    """Return "64.2 [61.2, 67.1]"."""
    return f"{percent(entry[name])} [{percent(entry['low'])}, {percent(entry['high'])}]"


def signed(entry: Json) -> str:
    """Return "+2.1 [0.3, 3.9], p 0.02"; bold where it is significant."""
    low, high, value = (100 * entry[key] for key in ("low", "high", "value"))
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}], p {p_text(entry['p_holm'])}"
    return f"**{text}**" if entry["p_holm"] < 0.05 else text


def p_text(p: float) -> str:
    """Return a p-value with two digits, "< 0.0001" below that."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def markdown(report: Json) -> str:
    """Return the whole table with what has to be known to read it."""
    names = [column["name"] for column in report["columns"]]
    head = ["", *(_title(column) for column in report["columns"]), *COSTS]
    rows = [[name, *_scores(row, names), *_costs(row)] for name, row in report["rows"].items()]
    first = next(iter(report["rows"]))
    against = [
        [name, *(_difference(row, column) for column in names)]
        for name, row in report["rows"].items()
        if name != first
    ]
    failed = [
        f"- {name}, seed {seed}: {reason}"
        for name, row in report["rows"].items()
        for seed, reason in row["failed"].items()
    ]
    lines = [
        f"# Ablation of {report['recipe']}: {', '.join(report['varied'])}",
        "",
        *markdown_table(head, rows),
        "",
        f"Difference to {first}, in points (bold: significant):",
        "",
        *markdown_table(["", *names], against),
        "",
        *(["Failed:", "", *failed, ""] if failed else []),
        *report["notes"],
    ]
    return "\n".join(lines) + "\n"


def _title(column: Json) -> str:
    return f"{column['name']} (n {column['n']}, chance {percent(column['chance'])})"


def _scores(row: Json, names: Sequence[str]) -> list[str]:
    if not row["scores"]:
        return ["failed", *[""] * (len(names) - 1)]
    return [interval(row["scores"][name]) for name in names]


def _difference(row: Json, column: str) -> str:
    entry = row["scores"].get(column, {}).get("difference")
    return "-" if entry is None else signed(entry)


def _costs(row: Json) -> list[str]:
    found = row["costs"]
    return [
        form.format(found[key] / unit) if found.get(key) is not None else "-"
        for key, unit, form in COSTS.values()
    ]


def csv_text(report: Json) -> str:
    """Return one line per row, all figures unrounded."""
    keys = sorted({key for row in report["rows"].values() for key in row["costs"]})
    head, lines = ["row", "trainings", "failed"], []
    for column in report["columns"]:
        name = column["name"]
        head += [name, f"{name} low", f"{name} high", f"{name} n", f"{name} chance"]
        head += [f"{name} deviation of seeds", f"{name} difference", f"{name} difference low"]
        head += [f"{name} difference high", f"{name} p", f"{name} p Holm"]
    for name, row in report["rows"].items():
        line = [name, row["trainings"], "; ".join(row["failed"].values())]
        for column in report["columns"]:
            cell = row["scores"].get(column["name"], {})
            change = cell.get("difference", {})
            line += [cell.get("accuracy"), cell.get("low"), cell.get("high")]
            line += [column["n"], column["chance"], cell.get("deviation")]
            line += [change.get(key) for key in ("value", "low", "high", "p", "p_holm")]
        lines.append([*line, *(row["costs"].get(key) for key in keys)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*head, *keys], *lines])
    return text.getvalue()
