"""What do the answers add up to? Rows in, one JSON-able table of scores out.

Every accuracy comes with its n, 95 % interval, chance level and blind baseline. With both scorings
the headline is the likelihood one: it is a forced choice, so a model that looks at nothing stands
at chance, and no reply is lost to reading. What generation says stands beside it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.foreign_answers import FOREIGN_PARSERS
from eval.intervals import Stratum, composite, paired_difference
from eval.protocols import Protocol
from eval.runner import BLIND, IMAGE, RunPlan
from eval.samples import Row, SampleStore
from eval.task import Formula, Task
from vlm.answers import LETTERS
from vlm.proportions import Interval, wilson

RESULTS_SCHEMA = 1
Json = dict[str, Any]

SCORING_TEXTS = {
    (
        "likelihood",
        "reason",
    ): "likeliest option letter after the model's own reasoning (forced choice)",
    ("likelihood", "direct"): "likeliest option letter right after the prompt (forced choice)",
    ("generation", "reason"): "letter read in the generated reply; unread replies are wrong",
    ("generation", "direct"): "letter read in the generated reply; unread replies are wrong",
}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The answers of one view in the order of the questions, and which are right per scoring."""

    rows: tuple[Row, ...]
    right: Mapping[str, tuple[bool, ...]]  # scoring -> one per row

    def where(self, keep: Sequence[bool]) -> "Scored":
        """Return the rows marked true."""
        pick = [i for i, kept in enumerate(keep) if kept]
        return Scored(
            rows=tuple(self.rows[i] for i in pick),
            right={name: tuple(marks[i] for i in pick) for name, marks in self.right.items()},
        )


def summarise(
    task: Task, store: SampleStore, plan: RunPlan, scorings: Sequence[str], strategy: str
) -> Json:
    """Return the scores of a complete run.

    The result's "tasks" maps each task to n, accuracy, low, high, chance, blind and more; "sources"
    likewise; "composites" lists the formulas, the first is the headline.
    """
    headline = "likelihood" if "likelihood" in scorings else "generation"
    views = {view: _scored(task, store, plan, view, scorings) for view in plan.views}
    seen, blind = views[IMAGE], views.get(BLIND)
    examples = [task.get_example(index) for index in plan.indices]
    formulas = task.formulas(examples)
    composites = [
        _composite(formula, scoring, seen, blind)
        for scoring in sorted(seen.right, key=lambda name: (name != headline, name))
        for formula in formulas
    ]
    return {
        "schema": RESULTS_SCHEMA,
        "benchmark": task.name,
        "label": task.label(plan.indices),
        "headline": {
            **composites[0],
            "strategy": strategy,
            "meaning": SCORING_TEXTS[headline, strategy],
        },
        **{
            f"{breakdown}s": _breakdown(breakdown, headline, seen, blind)
            for breakdown in task.breakdowns
        },
        "all": _cell(headline, seen, blind),
        "composites": composites,
        "reading_rules": {
            view: dict(sorted(Counter(row["rule"] for row in part.rows if row["rule"]).items()))
            for view, part in views.items()
        },
    }


def _scored(
    task: Task, store: SampleStore, plan: RunPlan, view: str, scorings: Sequence[str]
) -> Scored:
    """Return one view's rows, scored; by the protocol's foreign parser too, if it has one."""
    rows = tuple(store.rows[index, view] for index in plan.indices)
    examples = [task.get_example(row["index"]) for row in rows]
    right = {
        name: tuple(task.score(e, row[name]) for e, row in zip(examples, rows, strict=True))
        for name in scorings
    }
    foreign = plan.protocol.foreign_parser
    if "generation" in scorings and foreign is not None:
        read = FOREIGN_PARSERS[foreign]
        right[f"generation, {foreign} parser"] = tuple(
            task.score(e, read(row["reply"], e.choices))
            for e, row in zip(examples, rows, strict=True)
        )
    return Scored(rows=rows, right=right)


def _breakdown(name: str, headline: str, seen: Scored, blind: Scored | None) -> Json:
    groups = sorted({row["groups"][name] for row in seen.rows})
    cells = {}
    for group in groups:
        keep = [row["groups"][name] == group for row in seen.rows]
        cells[group] = _cell(
            headline, seen.where(keep), None if blind is None else blind.where(keep)
        )
    return cells


def _cell(headline: str, seen: Scored, blind: Scored | None) -> Json:
    """Return all that is reported of one group of questions."""
    rows, n = seen.rows, len(seen.rows)
    gold = Counter(row["answer"] for row in rows)
    commonest = max(sorted(gold), key=lambda letter: gold[letter])
    cell: Json = {
        "n": n,
        **_interval(_wilson(seen.right[headline]), "accuracy"),
        "chance": _round(_chance(rows)),
        "blind": None,
        "always_a": _round(gold["A"] / n),
        "majority": _round(gold[commonest] / n),
        "majority_letter": commonest,
        "letters": {"gold": _histogram(gold)},
    }
    if blind is not None:
        cell |= _interval(_wilson(blind.right[headline]), "blind", "blind_low", "blind_high")
        gain = paired_difference(seen.right[headline], blind.right[headline])
        cell |= _interval(gain, "vision_gain", "vision_gain_low", "vision_gain_high")
    for scoring in seen.right:
        cell[scoring] = _interval(_wilson(seen.right[scoring]), "accuracy")
        if blind is not None:
            cell[scoring] |= _interval(
                _wilson(blind.right[scoring]), "blind", "blind_low", "blind_high"
            )
        if scoring in rows[0]:
            cell["letters"][scoring] = _histogram(Counter(row[scoring] for row in rows))
    if "generation" in seen.right:
        cell["generation"] |= _unread(rows, "unread") | (
            {} if blind is None else _unread(blind.rows, "blind_unread")
        )
    if {"generation", "likelihood"} <= seen.right.keys():
        read = [row for row in rows if row["generation"] is not None]
        same = sum(row["generation"] == row["likelihood"] for row in read)
        rate = _round(same / len(read)) if read else None
        cell["agreement"] = {"n": len(read), "rate": rate}
    return cell


def _unread(rows: Sequence[Row], name: str) -> Json:
    """Count the replies in which no letter was read, and those cut by the token limit."""
    unread = sum(row["generation"] is None for row in rows)
    return {
        name: unread,
        f"{name}_rate": _round(unread / len(rows)),
        f"{name}_cut_short": sum(row["generation"] is None and not row["finished"] for row in rows),
    }


def _composite(formula: Formula, scoring: str, seen: Scored, blind: Scored | None) -> Json:
    """Return one formula's value under one scoring, with interval, chance and baseline."""
    entry: Json = {
        "name": formula.name,
        "formula": formula.text,
        "scoring": scoring,
        "n": sum(part.n for part in _strata(formula, seen.rows, seen.right[scoring])),
        **_interval(_value(formula, seen, scoring), "accuracy"),
        "chance": _round(_composite_chance(formula, seen.rows)),
        "blind": None,
    }
    if blind is not None:
        entry |= _interval(_value(formula, blind, scoring), "blind", "blind_low", "blind_high")
    return entry


def _value(formula: Formula, scored: Scored, scoring: str) -> Interval:
    strata = _strata(formula, scored.rows, scored.right[scoring])
    if len(strata) == 1:  # one proportion: the exact closed form, as in the tables
        return wilson(strata[0].correct, strata[0].n)
    return composite(strata)


def _strata(formula: Formula, rows: Sequence[Row], right: Sequence[bool]) -> list[Stratum]:
    if formula.by is None:
        return [Stratum(correct=sum(right), n=len(right), weight=1.0)]
    strata = []
    for group, weight in (formula.weights or {}).items():
        marks = [
            mark
            for row, mark in zip(rows, right, strict=True)
            if row["groups"][formula.by] == group
        ]
        strata.append(Stratum(correct=sum(marks), n=len(marks), weight=weight))
    return strata


def _composite_chance(formula: Formula, rows: Sequence[Row]) -> float:
    if formula.by is None:
        return _chance(rows)
    return sum(
        weight * _chance([row for row in rows if row["groups"][formula.by] == group])
        for group, weight in (formula.weights or {}).items()
    )


def _chance(rows: Sequence[Row]) -> float:
    """Return the exact expectation of a uniform guess: the mean of 1 / number of options."""
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)


def _wilson(right: Sequence[bool]) -> Interval:
    return wilson(sum(right), len(right))


def _interval(interval: Interval, name: str, low: str = "low", high: str = "high") -> Json:
    return {name: _round(interval.value), low: _round(interval.low), high: _round(interval.high)}


def _histogram(counts: Counter[str | None]) -> Json:
    """Return counts by letter, "unread" last."""
    known = {letter: counts[letter] for letter in LETTERS if counts[letter]}
    return {**known, "unread": counts[None]} if counts[None] else known


def _round(value: float) -> float:
    return round(value, 6)


def protocol_manifest(protocol: Protocol) -> Json:
    """Return the wording as it stands in the results file."""
    return {
        "name": protocol.name,
        "prefix": protocol.prefix,
        "suffix": protocol.suffix,
        "foreign_parser": protocol.foreign_parser,
    }
