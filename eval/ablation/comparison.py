"""What do the rows' answers add up to? Accuracies and differences to the first row, all with doubt.

One training per row: intervals cover the choice of questions. Several (seeds): they cover questions
and trainings. p-values of a column are corrected for the number of rows (Holm).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.intervals import Stratum, composite, paired_difference
from eval.significance import (
    ADDED_ANSWERS,
    ADDED_DIFFERENCES,
    PairedStratum,
    crossed_mean,
    holm,
    mcnemar,
    paired_bootstrap,
)
from eval.task import Example, Formula
from vlm.proportions import Interval, wilson

Json = dict[str, Any]
Answers = Mapping[str, np.ndarray]  # seed -> right or wrong (Q,)


@dataclass(frozen=True)
class Column:
    """One score that is compared.

    Attributes:
        name: the formula's, or the task's.
        text: how it is computed.
        strata: (places of its questions, weight) of each part; the weights sum to one.
        chance: what guessing gives.
    """

    name: str
    text: str
    strata: tuple[tuple[np.ndarray, float], ...]
    chance: float

    @property
    def n(self) -> int:
        """Return the number of questions."""
        return sum(len(places) for places, _ in self.strata)


def columns_of(examples: Sequence[Example], formula: Formula, breakdown: str) -> list[Column]:
    """Return the headline's column and one for each group of a breakdown.

    Args:
        examples: the questions, in the order of the answers.
        formula: the headline.
        breakdown: "task" gives one column per task.
    """
    chance = np.array([1 / len(example.choices) for example in examples])

    def places(by: str, group: str) -> np.ndarray:
        return np.array([i for i, e in enumerate(examples) if e.groups[by] == group])

    def column(name: str, text: str, strata: Sequence[tuple[np.ndarray, float]]) -> Column:
        guess = sum(weight * chance[where].mean() for where, weight in strata)
        return Column(name, text, tuple(strata), float(guess))

    if formula.by is None:
        parts = [(np.arange(len(examples)), 1.0)]
    else:
        parts = [(places(formula.by, g), w) for g, w in (formula.weights or {}).items()]
    groups = sorted({example.groups[breakdown] for example in examples})
    return [
        column(formula.name, formula.text, parts),
        *(column(g, "right answers / questions", [(places(breakdown, g), 1.0)]) for g in groups),
    ]


def compare(answers: Mapping[str, Answers], columns: Sequence[Column]) -> dict[str, Json]:
    """Return for each row and column the score and the difference to the first row.

    Args:
        answers: row -> seed -> answers; a row without any gets an empty entry.
        columns: what is compared.
    """
    rows: dict[str, Json] = {name: {} for name in answers}
    first = next(iter(answers))
    for column in columns:
        differences: dict[str, Json] = {}
        for name, own in answers.items():
            if not own:
                continue
            rows[name][column.name] = score(own, column)
            if name != first and (pairs := _pairs(own, answers[first])):
                differences[name] = difference(pairs, column)
        corrected = holm([entry["p"] for entry in differences.values()])
        for (name, entry), p in zip(differences.items(), corrected, strict=True):
            rows[name][column.name] |= {"difference": entry | {"p_holm": p}}
    return rows


def score(answers: Answers, column: Column) -> Json:
    """Return a row's accuracy with its interval, and each training's."""
    seeds = {
        seed: float(sum(weight * right[where].mean() for where, weight in column.strata))
        for seed, right in answers.items()
    }
    together = np.stack(list(answers.values()), axis=1)  # (Q, R)
    if len(answers) > 1:
        values = [(together[where], weight) for where, weight in column.strata]
        interval, _ = crossed_mean(values, ADDED_ANSWERS)
    else:
        strata = [
            Stratum(correct=int(together[where].sum()), n=len(where), weight=weight)
            for where, weight in column.strata
        ]
        lone = len(strata) == 1
        interval = wilson(strata[0].correct, strata[0].n) if lone else composite(strata)
    spread = float(np.std(list(seeds.values()), ddof=1)) if len(seeds) > 1 else None
    return {**_plain(interval, "accuracy"), "seeds": seeds, "deviation": spread}


def difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]], column: Column) -> Json:
    """Return row minus first row, with interval and p-value.

    Args:
        pairs: (row's answers, first row's answers) of each seed that both have.
        column: what is compared.
    """
    own, first = (np.stack(side, axis=1).astype(np.int8) for side in zip(*pairs, strict=True))
    change = own - first  # (Q, R)
    if len(pairs) > 1:
        values = [(change[where], weight) for where, weight in column.strata]
        interval, p = crossed_mean(values, ADDED_DIFFERENCES)
        test = "questions and trainings, t"
    elif len(column.strata) == 1:
        where = column.strata[0][0]
        interval = paired_difference(
            own[where, 0].astype(bool).tolist(), first[where, 0].astype(bool).tolist()
        )
        p = mcnemar(int((change[where] > 0).sum()), int((change[where] < 0).sum()))
        test = "McNemar, exact"
    else:
        interval, p = paired_bootstrap(
            [
                PairedStratum(
                    only_first=int((change[where] > 0).sum()),
                    only_second=int((change[where] < 0).sum()),
                    n=len(where),
                    weight=weight,
                )
                for where, weight in column.strata
            ]
        )
        test = "paired bootstrap"
    return {**_plain(interval, "value"), "p": p, "test": test, "trainings": len(pairs)}


def _pairs(own: Answers, first: Answers) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(right, first[seed]) for seed, right in own.items() if seed in first]


def _plain(interval: Interval, name: str) -> Json:
    return {name: interval.value, "low": interval.low, "high": interval.high}
