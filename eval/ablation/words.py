"""What do the numbers say? One paragraph, made from them, and what has to be known to read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.ablation.table_text import interval, percent_points, total_flops
from eval.report import percent

Json = Mapping[str, Any]
SIGNIFICANT = 0.05
NAMED = 3  # rows that are named per task, of those that differ


def conclusion(report: Json) -> str:
    """Return what differs significantly from the first row, and what is cheap."""
    names, rows = list(report["rows"]), report["rows"]
    first, column = names[0], report["columns"][0]["name"]
    if not rows[first]["scores"]:
        return f"{first}, the first row, has no trained model, so nothing is compared with it."
    others = [name for name in names[1:] if "difference" in rows[name]["scores"].get(column, {})]
    score = interval(rows[first]["scores"][column])
    if not others:
        return f"{first} has {score}; there is no other row to compare it with."
    parts = [f"Against {first} ({score}) in {column}: {_sides(report, column, others)}."]
    for entry in report["columns"][1:]:
        better, worse, _ = _split(report, entry["name"], others)
        if better or worse:
            parts.append(
                f"In {entry['name']}: {_sides(report, entry['name'], others, short=True)}."
            )
    quiet = [
        entry["name"]
        for entry in report["columns"][1:]
        if not any(_split(report, entry["name"], others)[:2])
    ]
    if quiet:
        parts.append(f"In {', '.join(quiet)} no row differs significantly.")
    return " ".join([*parts, *_cheapest(report, column, others)])


def _split(
    report: Json, column: str, names: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the rows that are better, worse, and neither, in the order of their difference."""
    found = {name: report["rows"][name]["scores"][column]["difference"] for name in names}
    ordered = sorted(names, key=lambda name: -found[name]["value"])
    sure = [name for name in ordered if found[name]["p_holm"] < SIGNIFICANT]
    return (
        [name for name in sure if found[name]["value"] > 0],
        [name for name in reversed(sure) if found[name]["value"] < 0],
        [name for name in ordered if name not in sure],
    )


def _sides(report: Json, column: str, names: Sequence[str], short: bool = False) -> str:
    """Return which rows are better, which worse; the short form names the most different ones."""
    better, worse, neither = _split(report, column, names)

    def listed(chosen: Sequence[str]) -> str:
        shown = chosen[:NAMED] if short else chosen
        entries = (report["rows"][name]["scores"][column]["difference"] for name in shown)
        texts = [f"{n} ({percent_points(e)})" for n, e in zip(shown, entries, strict=True)]
        rest = len(chosen) - len(shown)
        return ", ".join(texts) + (f" and {rest} more" if rest else "")

    texts = [
        f"significantly {word} {'are' if len(chosen) > 1 else 'is'} {listed(chosen)}"
        for word, chosen in (("better", better), ("worse", worse))
        if chosen
    ]
    if not texts:
        texts = ["no row differs significantly"]
    if neither and not short:
        texts.append(f"not shown to differ: {listed(neither)}")
    return "; ".join(texts)


def _cheapest(report: Json, column: str, names: Sequence[str]) -> list[str]:
    """Return a sentence on the cheapest row that is not significantly worse than the first."""
    rows = report["rows"]
    first = next(iter(rows))
    worse = _split(report, column, names)[1]
    able = [name for name in names if name not in worse and "flops_encoder" in rows[name]["costs"]]
    if not able or "flops_encoder" not in rows[first]["costs"]:
        return []
    best = min(able, key=lambda name: total_flops(rows[name]["costs"]))
    mine, theirs = (total_flops(rows[name]["costs"]) / 1e6 for name in (best, first))
    if mine >= theirs:
        return [f"No row that is not worse is cheaper than {first} ({theirs:.1f} MFLOP a picture)."]
    tokens = [rows[name]["costs"]["visual_tokens"] for name in (best, first)]
    points = percent_points(rows[best]["scores"][column]["difference"])
    return [
        f"The cheapest row that is not shown to be worse is {best} ({points}): {mine:.1f} MFLOP a "
        f"picture and {tokens[0]:.4g} tokens in the sequence, against {theirs:.1f} and "
        f"{tokens[1]:.4g} of {first}."
    ]


def notes(report: Json) -> list[str]:
    """Return how the numbers were made, one sentence or two per line of a list."""
    rows = report["rows"].values()
    several = max((row["trainings"] for row in rows), default=0) > 1
    column = report["columns"][0]
    lines = [
        f"{report['benchmark']}; {column['name']} = {column['text']}, n {column['n']}, chance "
        f"{percent(column['chance'])}. A question is scored by its likeliest option letter after "
        "the model's own reasoning.",
        _doubt(several),
        "p-values are Holm's, over the rows of a column; columns are not corrected for each other."
        " Where no difference is shown, the rows need not be equal: the interval says how far "
        "apart they may be.",
        _start(report),
        "All rows train with the recipe's learning rates and steps: a row may do better with its "
        "own.",
        _costs(report),
    ]
    if report["elsewhere"]:
        lines.append(
            f"The folder also holds {', '.join(report['elsewhere'])}, which this call did not ask "
            "for."
        )
    return [f"- {line}" for line in lines]


def _doubt(several: bool) -> str:
    if several:
        return (
            "Several trainings per row: intervals and p-values cover the choice of questions and "
            "of seeds (crossed random factors, Student's t), pairs being trainings of one seed."
        )
    return (
        "One training per row: intervals (Wilson; bootstrap for a mean of tasks) and p-values "
        "(exact McNemar test; paired bootstrap for a mean of tasks) cover the choice of "
        "questions alone. Another seed moves a row too; `--seeds 3` shows how much."
    )


def _start(report: Json) -> str:
    same = (
        "read the same files, byte for byte"
        if report["same_data"]
        else "did NOT all read the same files (see their manifest.json)"
    )
    used, stages = report["features_read"]
    return (
        f"All trainings {same}. Rows of one seed take the records in one order. The encoder's "
        f"features came from disk in {used} of {stages} stages."
    )


def _costs(report: Json) -> str:
    measured = report["measured"]
    turns = (
        "the rows in turns"
        if all(row["costs"].get("in_turns", True) for row in report["rows"].values())
        else "one row after the other (memory does not hold all)"
    )
    return (
        f"Costs on {measured['machine']}, {measured['threads']} threads. Visual tokens: those in "
        "the sequence, mean over the pictures asked about. FLOP: of one picture, as torch's "
        "FlopCounterMode counts matrix products, convolutions and attention; connector is what "
        "comes before the language model, language model what the picture adds to its pass over "
        "one question (connectors inside it included). Milliseconds: that question alone, median "
        f"and quartiles of {measured['rounds']}, {turns}. Prefill memory: weights and all tensors "
        "held at once. Training memory: the whole process, on a GPU what is allocated there. "
        "Training time depends on what else the machine did, and the first row of an encoder may "
        "have stored its features for the others."
    )
