"""Do table, conclusion and plot say what the numbers say, and leave no row out?"""

import copy
import csv
import io

import pytest

from eval.ablation.plot import draw, overlap, place, worth_it
from eval.ablation.table_text import csv_text, markdown
from eval.ablation.words import conclusion, notes


def cell(accuracy, difference=None, p=1.0, seeds=1):
    found = {
        "accuracy": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.03,
        "seeds": {str(seed): accuracy for seed in range(seeds)},
        "deviation": 0.01 if seeds > 1 else None,
    }  # fmt: skip
    if difference is not None:
        found["difference"] = {
            "value": difference, "low": difference - 0.02, "high": difference + 0.02, "p": p / 2,
            "p_holm": p, "test": "McNemar, exact", "trainings": seeds,
        }  # fmt: skip
    return found


def costs(tokens, flops, milliseconds):
    return {
        "visual_tokens": tokens, "parameters_connector": 33_024, "parameters": 1_637_400,
        "flops_encoder": 5_000_000, "flops_connector": flops, "flops_language_model": flops,
        "look_ms": 1.0, "look_ms_low": 0.9, "look_ms_high": 1.1,
        "prefill_ms": milliseconds, "prefill_ms_low": 0.9 * milliseconds,
        "prefill_ms_high": 1.2 * milliseconds, "prefill_peak_mb": 7.5, "in_turns": True,
        "training_seconds": 61.0, "training_peak_mb": 800.0,
    }  # fmt: skip


@pytest.fixture
def report():
    rows = {
        "mlp": ({"all": cell(0.6), "Count": cell(0.4)}, costs(64.0, 90e6, 9.0)),
        "good": ({"all": cell(0.7, 0.1, 0.001), "Count": cell(0.5, 0.1, 1e-9)},
                 costs(64.0, 95e6, 9.5)),
        "bad": ({"all": cell(0.5, -0.1, 0.01), "Count": cell(0.4, 0.0)}, costs(4.0, 5e6, 2.0)),
        "like": ({"all": cell(0.61, 0.01, 0.8), "Count": cell(0.41, 0.01)}, costs(16.0, 20e6, 4.0)),
    }  # fmt: skip
    found = {
        name: {"trainings": 1, "failed": {}, "scores": scores, "costs": cost, "changes": {}}
        for name, (scores, cost) in rows.items()
    }
    found["gone"] = {"trainings": 0, "failed": {"0": "training: the loss became nan"},
                     "scores": {}, "costs": {}, "changes": {}}  # fmt: skip
    return {
        "title": "tiny: connector",
        "benchmark": "a benchmark",
        "same_data": True,
        "elsewhere": [],
        "features_read": (3, 8),
        "measured": {"machine": "a machine", "threads": 2, "rounds": 15},
        "columns": [
            {"name": "all", "text": "right / questions", "n": 1000, "chance": 0.35},
            {"name": "Count", "text": "right / questions", "n": 500, "chance": 0.2},
        ],
        "rows": found,
    }


def test_table_has_every_row_its_doubt_and_what_it_means(report):
    text = markdown(report, report["title"], conclusion(report), notes(report))
    assert "| all (n 1000, chance 35.0) |" in text
    assert "| mlp | 60.0 [57.0, 63.0] | 40.0 [37.0, 43.0] | 64 | 0.033 | 1.637 |" in text
    assert (
        "| good | **+10.0 [+8.0, +12.0], p 0.001** | **+10.0 [+8.0, +12.0], p < 0.0001** |" in text
    )
    assert "| like | +1.0 [-1.0, +3.0], p 0.8 |" in text
    assert "| gone | failed |" in text and "- gone, seed 0: training: the loss became nan" in text
    assert "| 1.0 (0.9 to 1.1) | 9.0 (8.1 to 10.8) | 7.5 | 800 | 61 |" in text
    for said in (
        "Holm",
        "2 threads",
        "same files",
        "in 3 of 8 stages",
        "cover the choice of questions alone",
    ):
        assert said in text
    assert "seed 0 |" not in text  # one training each needs no table of them


def test_conclusion_names_what_differs_and_what_is_cheap(report):
    text = conclusion(report)
    assert text.startswith("Against mlp (60.0 [57.0, 63.0]) in all: significantly better is good (")
    assert "significantly worse is bad (-10.0 [-12.0, -8.0])" in text
    assert "not shown to differ: like (+1.0 [-1.0, +3.0])" in text
    assert "In Count: significantly better is good" in text
    assert "not shown to be worse is like (+1.0 [-1.0, +3.0]): 45.0 MFLOP a picture and 16" in text
    assert "gone" not in text


def test_conclusion_where_there_is_nothing_to_compare(report):
    lone = copy.deepcopy(report)
    lone["rows"] = {"mlp": report["rows"]["mlp"]}
    assert "no other row" in conclusion(lone)
    failed = copy.deepcopy(report)
    failed["rows"] = {"gone": report["rows"]["gone"], **report["rows"]}
    assert "has no trained model" in conclusion(failed)
    alike = copy.deepcopy(report)
    alike["rows"] = {name: report["rows"][name] for name in ("mlp", "like")}
    assert "no row differs significantly" in conclusion(alike)
    assert "In Count no row differs significantly." in conclusion(alike)


def test_several_trainings_are_listed_and_said_to_be_covered(report):
    report["rows"]["good"]["scores"]["all"] = cell(0.7, 0.1, 0.001, seeds=3)
    report["rows"]["good"]["trainings"] = 3
    text = markdown(report, report["title"], conclusion(report), notes(report))
    assert "| good | 70.0 | 70.0 | 70.0 | 70.0 | 1.0 |" in text
    assert "cover the choice of questions and of seeds" in text


def test_other_files_and_measuring_one_by_one_are_said(report):
    report["same_data"] = False
    report["rows"]["like"]["costs"]["in_turns"] = False
    text = "\n".join(notes(report))
    assert "did NOT all read the same files" in text and "one row after the other" in text


def test_csv_is_unrounded_and_rectangular(report):
    lines = list(csv.reader(io.StringIO(csv_text(report))))
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(report["rows"])
    good = dict(zip(lines[0], lines[2], strict=True))
    assert good["row"] == "good" and good["all difference p Holm"] == "0.001"
    assert good["prefill_ms_low"] == str(0.9 * 9.5) and good["flops_connector"] == "95000000.0"
    gone = dict(zip(lines[0], lines[-1], strict=True))
    assert gone["failed"] == "training: the loss became nan" and gone["all"] == ""


def test_plot_is_drawn_of_what_there_is(report, tmp_path):
    assert draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    report["rows"] = {"gone": report["rows"]["gone"]}
    assert not draw(report, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_worth_it_are_those_that_none_beats_in_both():
    points = {"a": (1.0, 0.5), "b": (2.0, 0.4), "c": (3.0, 0.9), "d": (3.0, 0.8), "e": (9.0, 0.9)}
    assert worth_it(points) == ["a", "c"]


def test_labels_move_until_they_cover_nothing():
    inside, taken = (0.0, 0.0, 400.0, 400.0), [(192.0, 192.0, 208.0, 208.0)]
    for _ in range(12):
        _, box = place(200, 200, 60, 12, taken, inside)
        assert all(overlap(box, other) <= 0.01 * 60 * 12 for other in taken)
        assert overlap(box, inside) == pytest.approx(60 * 12)
        taken.append(box)
