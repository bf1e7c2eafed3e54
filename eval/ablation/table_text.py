"""How does the comparison look as a table? Markdown for people, CSV with unrounded figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import markdown_table, percent, with_interval

Json = Mapping[str, Any]

# Title of a column -> its key in a row's costs, the unit, the format.
COSTS = {
    "visual tokens": ("visual_tokens", 1.0, "{:.4g}"),
    "connector, M parameters": ("parameters_connector", 1e6, "{:.3f}"),
    "model, M parameters": ("parameters", 1e6, "{:.3f}"),
    "connector, MFLOP": ("flops_connector", 1e6, "{:.1f}"),
    "language model, MFLOP": ("flops_language_model", 1e6, "{:.1f}"),
    "encoder + connector, ms": ("look_ms", 1.0, "{:.1f}"),
    "prefill, ms": ("prefill_ms", 1.0, "{:.1f}"),
    "prefill, MB": ("prefill_peak_mb", 1.0, "{:.1f}"),
    "training, MB": ("training_peak_mb", 1.0, "{:.0f}"),
    "training, s": ("training_seconds", 1.0, "{:.0f}"),
}
interval = with_interval


def total_flops(costs: Json) -> float:
    """Return the operations of one picture in encoder, connector and language model."""
    return sum(costs[f"flops_{part}"] for part in ("encoder", "connector", "language_model"))


def percent_points(entry: Json) -> str:
    """Return "+2.1 [+0.3, +3.9]"."""
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def p_text(p: float) -> str:
    """Return a p-value with two digits, "< 0.0001" below that."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def markdown(report: Json, title: str, conclusion: str, notes: Sequence[str]) -> str:
    """Return the whole page: table, differences, trainings, failures, how to read it."""
    names = [column["name"] for column in report["columns"]]
    lines = [f"# {title}", "", *markdown_table(["", *map(_title, report["columns"]), *COSTS], [
        [name, *_scores(row, names), *_costs(row)] for name, row in report["rows"].items()
    ]), "", conclusion, ""]  # fmt: skip
    first, *others = report["rows"]
    if others:
        against = [
            [name, *(_difference(report["rows"][name], column) for column in names)]
            for name in others
        ]
        lines += [f"Difference to {first} in points, with p (bold: p < 0.05):", ""]
        lines += [*markdown_table(["", *names], against), ""]
    lines += _trainings(report, names[0])
    if failed := failures(report):
        lines += ["Failed:", "", *(f"- {line}" for line in failed), ""]
    return "\n".join([*lines, *notes]) + "\n"


def failures(report: Json) -> list[str]:
    """Return a line for each training that failed."""
    return [
        f"{name}, seed {seed}: {reason}"
        for name, row in report["rows"].items()
        for seed, reason in row["failed"].items()
    ]


def _title(column: Json) -> str:
    return f"{column['name']} (n {column['n']}, chance {percent(column['chance'])})"


def _scores(row: Json, names: Sequence[str]) -> list[str]:
    if not row["scores"]:
        return ["failed", *[""] * (len(names) - 1)]
    return [interval(row["scores"][name]) for name in names]


def _difference(row: Json, column: str) -> str:
    entry = row["scores"].get(column, {}).get("difference")
    if entry is None:
        return "-"
    text = f"{percent_points(entry)}, p {p_text(entry['p_holm'])}"
    return f"**{text}**" if entry["p_holm"] < 0.05 else text


def _costs(row: Json) -> list[str]:
    found, texts = row["costs"], []
    for key, unit, form in COSTS.values():
        if key not in found:
            texts.append("-")
            continue
        text = form.format(found[key] / unit)
        if f"{key}_low" in found:
            low, high = (form.format(found[f"{key}_{end}"] / unit) for end in ("low", "high"))
            text += f" ({low} to {high})"
        texts.append(text)
    return texts


def _trainings(report: Json, column: str) -> list[str]:
    """Return the table of seeds, nothing where each row was trained once."""
    scores = {name: row["scores"].get(column) for name, row in report["rows"].items()}
    found = {seed for cell in scores.values() if cell for seed in cell["seeds"]}
    if len(found) < 2:
        return []
    seeds = sorted(found, key=int)
    rows = [
        [
            name,
            *(percent(cell["seeds"].get(seed)) for seed in seeds),
            percent(cell["accuracy"]),
            percent(cell["deviation"]),
        ]
        for name, cell in scores.items()
        if cell
    ]
    head = ["", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"]
    return [f"{column} of each training:", "", *markdown_table(head, rows), ""]


def csv_text(report: Json) -> str:
    """Return one line per row, all figures unrounded."""
    keys = sorted({key for row in report["rows"].values() for key in row["costs"]})
    names = [column["name"] for column in report["columns"]]
    seeds = sorted(
        {
            seed
            for row in report["rows"].values()
            for cell in row["scores"].values()
            for seed in cell["seeds"]
        },
        key=int,
    )
    head = ["row", "trainings", "failed"]
    for name in names:
        head += [name, *(f"{name} {part}" for part in ("low", "high", "n", "chance", "deviation"))]
        head += [f"{name} seed {seed}" for seed in seeds]
        head += [f"{name} difference{part}" for part in ("", " low", " high", " p", " p Holm")]
    lines = []
    for name, row in report["rows"].items():
        line = [name, row["trainings"], "; ".join(map(str, row["failed"].values()))]
        for column in report["columns"]:
            cell = row["scores"].get(column["name"], {"seeds": {}})
            change = cell.get("difference", {})
            line += [cell.get(key) for key in ("accuracy", "low", "high")]
            line += [column["n"], column["chance"], cell.get("deviation")]
            line += [cell["seeds"].get(seed) for seed in seeds]
            line += [change.get(key) for key in ("value", "low", "high", "p", "p_holm")]
        lines.append([*line, *(row["costs"].get(key) for key in keys)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*head, *keys], *lines])
    return text.getvalue()
