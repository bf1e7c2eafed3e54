"""Do two models differ on the same questions, and how sure is that over several trainings?

One training each: the exact McNemar test, or a paired bootstrap for a composite score. That covers
the choice of questions and nothing else. Several trainings each (seeds): questions and trainings
are both random, and the standard error adds the two, as the quasi-F test for crossed random factors
does (Clark 1973, "The language-as-fixed-effect fallacy").

Shapes: Q questions, R trainings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.intervals import BOOTSTRAP_SEED
from vlm.proportions import Interval

PAIRED_DRAWS = 100_000  # the smallest p-value is 2 in so many; many rows' correction multiplies it


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (a binomial test with 1/2).

    Args:
        only_first: questions that the first model alone answers rightly.
        only_second: questions that the second alone answers rightly.
    """
    assert only_first >= 0 and only_second >= 0
    n, few = only_first + only_second, min(only_first, only_second)
    # Whole numbers: floats would underflow beyond a thousand discordant questions.
    term = tail = 1  # n over 0
    for k in range(few):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order given."""
    count = len(p_values)
    corrected, largest = [0.0] * count, 0.0
    for rank, place in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


@dataclass(frozen=True)
class PairedStratum:
    """One part of a composite score: what two models make of its n questions."""

    only_first: int
    only_second: int
    n: int
    weight: float


def paired_bootstrap(
    strata: Sequence[PairedStratum], draws: int = PAIRED_DRAWS, seed: int = BOOTSTRAP_SEED
) -> tuple[Interval, float]:
    """Return first minus second of a composite score, with its 95 % interval, and a p-value.

    Questions are drawn again within each stratum, for both models the same: one multinomial draw of
    the three kinds of questions. The p-value is twice the share of draws at or beyond zero.
    """
    assert strata and abs(sum(part.weight for part in strata) - 1) < 1e-9
    random = np.random.default_rng(seed)
    differences = np.zeros(draws)
    for part in strata:
        shares = np.array([part.only_first, part.only_second]) / part.n
        drawn = random.multinomial(part.n, [*shares, max(0.0, 1 - shares.sum())], draws)
        differences += part.weight * (drawn[:, 0] - drawn[:, 1]) / part.n
    low, high = np.quantile(differences, [0.025, 0.975])
    value = sum(part.weight * (part.only_first - part.only_second) / part.n for part in strata)
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (draws + 1))
    return Interval(value=value, low=float(low), high=float(high)), float(p)


# Questions added to each stratum, of one value in all trainings: they keep the interval honest
# where all values are equal. As Agresti and Coull (1998) for answers, Bonett and Price (2012) for
# differences.
ADDED_ANSWERS = (0.0, 0.0, 1.0, 1.0)
ADDED_DIFFERENCES = (-1.0, 1.0)


def crossed_mean(
    strata: Sequence[tuple[np.ndarray, float]], added: Sequence[float]
) -> tuple[Interval, float]:
    """Return a mean over questions and trainings, its 95 % interval, and p of its being zero.

    The variance of the mean is that of the questions' means and that of the trainings' means, less
    their interaction, which both contain; the degrees of freedom are Satterthwaite's.

    Args:
        strata: (values (Q, R), weight) of each part of a composite score, R of 2 or more; the
            weights sum to one. Values are right or wrong (1 or 0), or differences between two
            models trained with the same seed.
        added: `ADDED_ANSWERS` or `ADDED_DIFFERENCES`.
    """
    assert strata and abs(sum(weight for _, weight in strata) - 1) < 1e-9
    trainings = strata[0][0].shape[1]
    assert trainings > 1, "one training says nothing of others"
    questions, interaction, freedom = 0.0, 0.0, 0
    scores = np.zeros(trainings)
    for values, weight in strata:
        rows = np.repeat(np.asarray(added)[:, None], trainings, axis=1)
        padded = np.concatenate([values.astype(np.float64), rows])
        means = padded.mean(1)
        rest = padded - means[:, None] - padded.mean(0) + padded.mean()
        count = len(padded)
        questions += weight**2 * means.var(ddof=1) / count
        interaction += weight**2 * (rest**2).sum() / ((count - 1) * (trainings - 1)) / rest.size
        freedom += count - 1
        scores += weight * padded.mean(0)
    runs = scores.var(ddof=1) / trainings
    variance = max(questions + runs - interaction, questions, runs)
    degrees = (questions + runs) ** 2 / (questions**2 / freedom + runs**2 / (trainings - 1))
    centre, error = float(scores.mean()), float(np.sqrt(variance))
    half = error * student_quantile(degrees)
    low, high = min(added), max(added)
    value = float(sum(weight * values.mean() for values, weight in strata))
    interval = Interval(value=value, low=max(low, centre - half), high=min(high, centre + half))
    return interval, student_p(centre / error, degrees)


def student_p(t: float, degrees: float) -> float:
    """Return the two-sided p-value of Student's t."""
    angles, tail = _student_tail(degrees)
    return float(np.interp(np.arctan(abs(t) / np.sqrt(degrees)), angles, tail))


def student_quantile(degrees: float, level: float = 0.95) -> float:
    """Return the t that |T| stays below with probability `level`."""
    angles, tail = _student_tail(degrees)
    angle = np.interp(1 - level, tail[::-1], angles[::-1])
    return float(np.sqrt(degrees) * np.tan(angle))


def _student_tail(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles from 0 to pi / 2, and P(|T| > sqrt(degrees) tan(angle)).

    In the angle, Student's density is cos ** (degrees - 1), which is easy to sum.
    """
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles).clip(0) ** (degrees - 1)
    steps = (density[1:] + density[:-1]) / 2
    tail = np.append(steps[::-1].cumsum()[::-1], 0.0)
    return angles, tail / tail[0]
