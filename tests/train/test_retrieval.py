"""Are sums over pairs turned into the right shares, chances and intervals?"""

import pytest
import torch

from connectors.qformer_losses import Stage1Output
from train.retrieval import Totals, describe, figures_of


def output(**changes):
    fields = {name: torch.zeros(4) for name in Stage1Output._fields}
    return Stage1Output(**{**fields, **{k: torch.tensor(v).float() for k, v in changes.items()}})


def totals():
    """Two steps; the last pair of the second is none."""
    found = Totals()
    first = output(
        contrastive=[1, 2, 3, 4],
        matching=[0.5] * 4,
        caption=[10, 20, 30, 40],
        words=[5, 5, 10, 10],
        found_text=[1, 1, 0, 1],
        found_image=[0, 0, 0, 1],
        chance=[0.25] * 4,
        accepted=[1, 1, 1, 1],
        refused=[0, 0.5, 0.5, 0],
    )
    found.add(first, torch.ones(4, dtype=torch.bool))
    second = output(contrastive=[2, 2, 2, 99], accepted=[0, 1, 0, 1], words=[1, 1, 1, 9])
    found.add(second, torch.tensor([True, True, True, False]))
    return found.sums(torch.device("cpu"))


def test_averages():
    found = Totals.averages(totals())
    assert found["loss/contrastive"] == pytest.approx(16 / 7)
    assert found["loss/matching"] == pytest.approx(2 / 7)
    assert found["loss/caption"] == pytest.approx(100 / 33)
    assert found["recall/image_to_text"] == pytest.approx(3 / 7)
    assert found["recall/text_to_image"] == pytest.approx(1 / 7)
    assert found["recall/chance"] == pytest.approx(1 / 7)
    assert found["matching_accuracy"] == pytest.approx((5 / 7 + 1 / 7) / 2)


def test_shares_have_intervals_and_negatives_are_counted_one_by_one():
    found = figures_of(totals(), 4)
    assert found["n"] == 7
    assert found["recall_image_to_text"]["value"] == pytest.approx(3 / 7)
    assert found["recall_image_to_text"]["low"] == pytest.approx(0.1582, abs=1e-4)
    assert found["pairs_accepted"]["value"] == pytest.approx(5 / 7)
    assert found["negatives_refused"]["value"] == pytest.approx(2 / 14)
    told = describe({**found, "left_out": 2})
    assert "held out (7 pairs, 4 compared at once, 2 left out)" in told
    assert "nearest caption right 42.9 % [15.8, 75.0]" in told


def test_nothing_to_measure():
    assert figures_of(Totals().sums(torch.device("cpu")), 4) == {"n": 0, "compared_at_once": 4}
    assert "no pair" in describe({"n": 0, "left_out": 3})
    assert Totals.averages(Totals().sums(torch.device("cpu")))["loss/caption"] == 0
