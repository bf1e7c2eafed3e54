"""Do the log, the plot and the manifest's counts hold what they say?"""

import json

import pytest

from train.callbacks import read_log
from train.manifest import count_skipped, hash_tree
from train.plot import draw_loss, smooth


def test_log_without_its_torn_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 2}]


def test_smoothing_keeps_a_constant_and_halves_noise():
    assert smooth([3.0] * 5, 10) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 5.0], 1) == pytest.approx([1.0, 5.0])
    averaged = smooth([0.0, 1.0] * 200, 20)
    assert max(averaged[100:]) - min(averaged[100:]) < 0.1


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_plot_of_any_length(tmp_path, steps):
    log = [{"step": s, "loss": 2 / s, "learning_rate/connector": 1e-3} for s in range(1, steps + 1)]
    draw_loss(log, "a title", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists() == (steps > 0)


def test_a_record_met_again_after_a_resume_is_counted_once(tmp_path):
    notes = [(5, "a"), (9, "b"), (5, "a")]
    lines = [json.dumps({"position": p, "source": s}) + "\n" for p, s in notes]
    (tmp_path / "skipped.0.jsonl").write_text("".join(lines))
    (tmp_path / "skipped.1.jsonl").write_text(lines[1].replace("9", "11") + '{"posi')
    assert count_skipped(tmp_path) == {"a": 1, "b": 2}


def test_hash_does_not_depend_on_order():
    assert hash_tree({"a": 1, "b": [2]}) == hash_tree({"b": [2], "a": 1}) != hash_tree({"a": 2})
