"""How are the scores shown to a person? One Markdown report and one table for the console."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def with_interval(cell: Json, name: str = "accuracy", low: str = "low", high: str = "high") -> str:
    """Return "72.3 [70.6, 74.0]"."""
    if cell.get(name) is None:
        return "-"
    return f"{percent(cell[name])} [{percent(cell[low])}, {percent(cell[high])}]"


def console_table(results: Json) -> str:
    """Return the headline and one line per task, for the terminal."""
    head = ("", "n", "accuracy", "chance", "blind", "vision gain", "unread")
    rows = [_console_row(name, cell) for name, cell in results["tasks"].items()]
    rows.append(_console_row("all (pooled)", results["all"]))
    headline = results["headline"]
    return "\n".join(
        [
            f"{results['label']}",
            f"scored by: {headline['meaning']}",
            "",
            *_aligned([head, *rows]),
            "",
            f"headline {headline['name']} = {headline['formula']}: {with_interval(headline)}"
            f", chance {percent(headline['chance'])}",
        ]
    )


def markdown_report(results: Json) -> str:
    """Return the whole report: headline, formulas, tables, readings, manifest."""
    headline, manifest, run = results["headline"], results["manifest"], results["run"]
    generation = "generation" in manifest["settings"]["scorings"]
    lines = [
        f"# {results['benchmark']}: {percent(headline['accuracy'])} ({headline['name']})",
        "",
        f"Data: **{results['label']}**.",
        f"Headline: {headline['name']} = {headline['formula']}, {with_interval(headline)} "
        f"(95 % interval), n = {headline['n']}, chance {percent(headline['chance'])}, "
        f"blind {with_interval(headline, 'blind', 'blind_low', 'blind_high')}.",
        f"Scored by: {headline['meaning']}.",
        "Blind: the same model and prompts without the picture.",
        "",
        "## Composite scores",
        "",
        *markdown_table(
            ("score", "formula", "scoring", "n", "accuracy [95 %]", "chance", "blind"),
            (
                (
                    entry["name"],
                    entry["formula"],
                    entry["scoring"],
                    entry["n"],
                    with_interval(entry),
                    percent(entry["chance"]),
                    with_interval(entry, "blind", "blind_low", "blind_high"),
                )
                for entry in results["composites"]
            ),
        ),
    ]
    for title, cells in _tables(results):
        lines += ["", f"## {title}", "", *markdown_table(CELL_HEAD, map(_cell_row, cells.items()))]
        if generation:
            lines += ["", *markdown_table(READ_HEAD, map(_read_row, cells.items()))]
    lines += [
        "",
        "## Letters",
        "",
        *markdown_table(("group", "whose", "counts"), _letters(results)),
    ]
    if generation:
        lines += [
            "",
            "## How replies were read",
            "",
            *markdown_table(("view", "rule", "replies"), _rules(results)),
        ]
    lines += ["", "## How it was made", "", *_manifest(manifest), ""]
    lines.append(
        f"Time: {run['seconds']} s for {run['answers_new']} answers "
        f"({run['answers_found']} found), {run['peak_memory_mb']} MB at most."
    )
    return "\n".join(lines) + "\n"


CELL_HEAD = (
    "group",
    "n",
    "accuracy [95 %]",
    "chance",
    "blind",
    "vision gain",
    "always A",
    "majority",
)
READ_HEAD = ("group", "by likelihood", "by generation", "unread", "unread blind", "agreement (n)")


def _tables(results: Json) -> list[tuple[str, Json]]:
    found = [(f"By {name}", results[f"{name}s"]) for name in results["manifest"]["breakdowns"]]
    return [*found, ("All questions", {"all": results["all"]})]


def _cell_row(item: tuple[str, Json]) -> tuple[Any, ...]:
    name, cell = item
    return (
        name,
        cell["n"],
        with_interval(cell),
        percent(cell["chance"]),
        with_interval(cell, "blind", "blind_low", "blind_high"),
        with_interval(cell, "vision_gain", "vision_gain_low", "vision_gain_high"),
        percent(cell["always_a"]),
        f"{percent(cell['majority'])} ({cell['majority_letter']})",
    )


def _read_row(item: tuple[str, Json]) -> tuple[Any, ...]:
    name, cell = item
    written, agreement = cell["generation"], cell.get("agreement")
    blind = written.get("blind_unread")
    return (
        name,
        with_interval(cell["likelihood"]) if "likelihood" in cell else "-",
        with_interval(written),
        f"{written['unread']} ({percent(written['unread_rate'])} %)",
        "-" if blind is None else f"{blind} ({percent(written['blind_unread_rate'])} %)",
        "-" if agreement is None else f"{percent(agreement['rate'])} ({agreement['n']})",
    )


def _letters(results: Json) -> Iterable[tuple[Any, ...]]:
    for _, cells in _tables(results):
        for name, cell in cells.items():
            for whose, counts in cell["letters"].items():
                yield name, whose, ", ".join(f"{letter} {n}" for letter, n in counts.items())


def _rules(results: Json) -> Iterable[tuple[Any, ...]]:
    for view, counts in results["reading_rules"].items():
        for rule, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            yield view, rule, n


def _manifest(manifest: Json) -> list[str]:
    """Return the manifest as a list, one line per entry or file."""
    lines = []
    for name, value in manifest.items():
        files = isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
        lines += [f"- {name}: {_flat(item)}" for item in (value if files else [value])]
    return lines


def _flat(value: Any) -> str:
    """Return a value on one line; texts inside others are quoted, so that blanks can be seen."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner!r}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return repr(value) if "\n" in str(value) else str(value)


def _console_row(name: str, cell: Json) -> tuple[str, ...]:
    written = cell.get("generation")
    return (
        name,
        str(cell["n"]),
        with_interval(cell),
        percent(cell["chance"]),
        percent(cell["blind"]),
        with_interval(cell, "vision_gain", "vision_gain_low", "vision_gain_high"),
        "-" if written is None else str(written["unread"]),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    return lines
