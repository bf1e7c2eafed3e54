"""Do the intervals have their known values and their promised coverage?"""

import numpy as np
import pytest

from eval.intervals import Stratum, composite, paired_difference
from vlm.proportions import wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # from the closed form, as printed by R's prop.test(correct = FALSE)
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (720, 1000, 0.6914, 0.7469),
    ],
)
def test_wilson_known_values(correct: int, n: int, low: float, high: float):
    interval = wilson(correct, n)
    assert interval.value == correct / n
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_wilson_coverage(n: int, share: float):
    draws = np.random.default_rng(0).binomial(n, share, 4000)
    bounds = {int(k): wilson(int(k), n) for k in np.unique(draws)}
    covered = np.mean([bounds[int(k)].low <= share <= bounds[int(k)].high for k in draws])
    assert 0.925 <= covered <= 0.975


def test_composite_value_is_the_weighted_mean_and_not_the_pooled_one():
    strata = [
        Stratum(correct=500, n=633, weight=0.25),
        Stratum(correct=600, n=805, weight=0.25),
        Stratum(correct=700, n=1200, weight=0.5),
    ]
    interval = composite(strata)
    expected = (500 / 633 + 600 / 805) / 4 + 700 / 1200 / 2
    assert interval.value == pytest.approx(expected)
    assert interval.value != pytest.approx(1800 / 2638, abs=1e-3)
    # variance: sum of weight^2 p q / n
    spread = sum(s.weight**2 * (s.correct / s.n) * (1 - s.correct / s.n) / s.n for s in strata)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * spread**0.5, rel=0.03)
    assert composite(strata) == interval, "the same answers must give the same interval"


def test_composite_coverage():
    random = np.random.default_rng(1)
    sizes, shares, weights = [60, 90, 120], [0.7, 0.6, 0.8], [0.25, 0.25, 0.5]
    truth = sum(w * p for w, p in zip(weights, shares, strict=True))
    covered = 0
    for trial in range(400):
        strata = [
            Stratum(correct=int(random.binomial(n, p)), n=n, weight=w)
            for n, p, w in zip(sizes, shares, weights, strict=True)
        ]
        interval = composite(strata, draws=500, seed=trial)
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_paired_difference_by_hand():
    first = [True] * 30 + [False] * 10
    second = [True] * 20 + [False] * 10 + [True] * 5 + [False] * 5
    interval = paired_difference(first, second)  # 10 only first, 5 only second, n 40
    assert interval.value == pytest.approx(5 / 40)
    p12, p21 = 11 / 42, 6 / 42
    half = 1.959964 * ((p12 + p21 - (p12 - p21) ** 2) / 42) ** 0.5
    assert interval.low == pytest.approx(p12 - p21 - half, abs=1e-6)
    assert interval.high == pytest.approx(p12 - p21 + half, abs=1e-6)


def test_paired_difference_coverage():
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        first = random.random(150) < 0.7
        second = np.where(random.random(150) < 0.6, first, random.random(150) < 0.5)
        interval = paired_difference(first.tolist(), second.tolist())
        covered += interval.low <= 0.7 - (0.6 * 0.7 + 0.4 * 0.5) <= interval.high
    assert 0.93 <= covered / 1000 <= 0.975
