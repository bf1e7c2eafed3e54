"""Are the tests of paired answers exact where that is known, and honest where it is simulated?"""

from math import comb

import numpy as np
import pytest

from eval.significance import (
    ADDED_ANSWERS,
    ADDED_DIFFERENCES,
    PairedStratum,
    crossed_mean,
    holm,
    mcnemar,
    paired_bootstrap,
    student_p,
    student_quantile,
)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 2**5),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (1, 0, 1.0),
        (121, 59, 0.0000045),  # scipy.stats.binomtest(59, 180).pvalue
    ],
)
def test_mcnemar_is_the_binomial_test(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, rel=0.02)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_thousands_of_questions_does_not_underflow():
    few = sum(comb(1200, k) for k in range(301))
    assert mcnemar(300, 900) == 2 * few / 2**1200 > 0
    assert 0 < mcnemar(1800, 2200) < 1e-9


def test_holm_against_a_table():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_bootstrap_agrees_with_the_closed_form_and_is_repeatable():
    strata = [PairedStratum(30, 10, 500, 0.5), PairedStratum(20, 20, 250, 0.5)]
    interval, p = paired_bootstrap(strata)
    shares = [(30 / 500, 10 / 500, 500), (20 / 250, 20 / 250, 250)]
    variance = sum(0.25 * (a + b - (a - b) ** 2) / n for a, b, n in shares)
    assert interval.value == pytest.approx(0.02)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.05)
    assert paired_bootstrap(strata) == (interval, p)
    assert p == pytest.approx(0.156, abs=0.02)  # z = 1.417; draws have ties at zero


def test_paired_bootstrap_of_equal_answers_sees_no_difference():
    interval, p = paired_bootstrap([PairedStratum(0, 0, 10, 1.0)])
    assert (interval.low, interval.value, interval.high, p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042), (5000, 1.960)]
)
def test_student_against_the_table(degrees, quantile):
    assert student_quantile(degrees) == pytest.approx(quantile, abs=2e-3)
    assert student_p(quantile, degrees) == pytest.approx(0.05, abs=1e-4)
    assert student_p(0.0, degrees) == 1.0


def simulate(random, questions, trainings, between):
    """Right or wrong (Q, R): some questions are harder, some trainings worse."""
    hard = random.normal(0.5, 1.0, (questions, 1))
    luck = random.normal(0.0, between, (1, trainings))
    return (random.random((questions, trainings)) < 1 / (1 + np.exp(-hard - luck))) * 1.0


@pytest.mark.parametrize("between", [0.0, 0.4])
def test_interval_over_questions_and_trainings_covers_the_truth(between):
    random = np.random.default_rng(1)
    truth = simulate(random, 2_000_000, 1, 0.0).mean()
    truth = np.mean([simulate(random, 20_000, 1, between).mean() for _ in range(300)] + [truth])
    inside = 0
    for _ in range(300):
        interval, _ = crossed_mean([(simulate(random, 300, 3, between), 1.0)], ADDED_ANSWERS)
        inside += interval.low <= truth <= interval.high
    assert 0.91 <= inside / 300


def test_wide_where_trainings_differ_and_never_empty():
    random = np.random.default_rng(0)
    values = (random.random((400, 3)) < 0.5) * 1.0
    apart = values.copy()
    apart[:, 0] = (random.random(400) < 0.8) * 1.0
    widths = []
    for each in (values, apart, np.ones((400, 3))):
        interval, _ = crossed_mean([(each, 1.0)], ADDED_ANSWERS)
        widths.append(interval.high - interval.low)
        assert 0 <= interval.low < interval.high <= 1
    assert widths[1] > 3 * widths[0] and widths[2] > 0


def test_differences_between_like_models_are_seldom_significant_and_large_ones_are():
    random = np.random.default_rng(2)
    found = []
    for _ in range(200):
        first, second = simulate(random, 200, 3, 0.2), simulate(random, 200, 3, 0.2)
        found.append(crossed_mean([(first - second, 1.0)], ADDED_DIFFERENCES)[1] < 0.05)
    assert np.mean(found) < 0.09
    halves = [(np.full((50, 3), 0.0), 0.5), (np.full((50, 3), 1.0), 0.5)]
    interval, p = crossed_mean(halves, ADDED_DIFFERENCES)
    assert interval.value == 0.5 and interval.low > 0.3 and p < 1e-6
