"""Do scores and differences agree with what their parts say, for one training and for several?"""

import numpy as np
import pytest

from eval.ablation.comparison import columns_of, compare
from eval.significance import mcnemar
from eval.task import Example, Formula
from vlm.proportions import wilson

EXAMPLES = [
    Example(
        index=i,
        prompt="?",
        choices=("x", "y") if i < 60 else ("x", "y", "z", "w"),
        answer="A",
        groups={"task": "Depth" if i < 60 else "Count"},
    )
    for i in range(100)
]
POOLED = Formula(name="pooled", text="right / all")
MEAN = Formula(name="mean", text="mean", by="task", weights={"Depth": 0.5, "Count": 0.5})


def right(*places):
    marks = np.zeros(100, dtype=bool)
    marks[list(places)] = True
    return marks


def test_columns_have_their_questions_and_chance():
    head, count, depth = columns_of(EXAMPLES, MEAN, "task")
    assert (head.name, head.n, head.chance) == ("mean", 100, 0.375)
    assert (count.name, count.n, count.chance) == ("Count", 40, 0.25)
    assert (depth.name, depth.n, depth.chance) == ("Depth", 60, 0.5)


def test_one_training_gives_wilson_and_mcnemar():
    first, second = right(*range(50)), right(*range(30), *range(60, 63))
    rows = compare({"a": {"0": first}, "b": {"0": second}}, columns_of(EXAMPLES, POOLED, "task"))
    cell = rows["a"]["pooled"]
    interval = wilson(50, 100)
    assert (cell["accuracy"], cell["low"], cell["high"]) == (0.5, interval.low, interval.high)
    assert "difference" not in cell
    change = rows["b"]["pooled"]["difference"]
    assert change["value"] == pytest.approx(-0.17)
    assert change["p"] == mcnemar(3, 20) and change["test"].startswith("McNemar")
    assert change["low"] < change["value"] < change["high"] < 0
    assert rows["b"]["Count"]["accuracy"] == 3 / 40


def test_a_composite_is_weighted_and_tested_by_bootstrap():
    rows = compare({"a": {"0": right()}, "b": {"0": right(*range(60))}},
                   columns_of(EXAMPLES, MEAN, "task"))  # fmt: skip
    change = rows["b"]["mean"]["difference"]
    assert rows["b"]["mean"]["accuracy"] == change["value"] == 0.5
    assert change["test"] == "paired bootstrap" and change["p"] < 0.001


def test_p_values_are_corrected_for_the_rows_of_a_column():
    answers = {"a": {"0": right(*range(10))}}
    answers |= {f"b{k}": {"0": right(*range(10 + 6 + k))} for k in range(4)}
    rows = compare(answers, columns_of(EXAMPLES, POOLED, "task"))
    changes = [rows[f"b{k}"]["pooled"]["difference"] for k in range(4)]
    assert [c["p"] for c in changes] == [2 / 2 ** (6 + k) for k in range(4)]
    assert changes[3]["p_holm"] == 4 * changes[3]["p"]
    assert changes[0]["p_holm"] == changes[0]["p"]


def test_several_trainings_are_wider_than_one_and_paired_by_seed():
    random = np.random.default_rng(0)
    base = {str(seed): random.random(100) < 0.6 for seed in range(3)}
    better = {seed: marks | (random.random(100) < 0.2) for seed, marks in base.items()}
    columns = columns_of(EXAMPLES, POOLED, "task")
    rows = compare({"a": base, "b": better}, columns)
    cell = rows["b"]["pooled"]
    assert cell["accuracy"] == pytest.approx(np.mean([m.mean() for m in better.values()]))
    assert list(cell["seeds"]) == ["0", "1", "2"] and cell["deviation"] > 0
    assert cell["difference"]["trainings"] == 3 and cell["difference"]["p"] < 0.05
    del better["0"]  # a failed training: the pairs that are left count
    assert compare({"a": base, "b": better}, columns)["b"]["pooled"]["difference"]["trainings"] == 2


def test_rows_without_answers_stay_and_a_missing_first_row_leaves_no_difference():
    columns = columns_of(EXAMPLES, POOLED, "task")
    rows = compare({"a": {}, "b": {"0": right(1)}}, columns)
    assert rows["a"] == {} and "difference" not in rows["b"]["pooled"]
