"""How sure are we of a score? Intervals for a paired difference and for a composite."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from vlm.proportions import Z95, Interval

BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 20_240_624  # fixed: the same answers give the same interval, byte for byte


def paired_difference(first: Sequence[bool], second: Sequence[bool], z: float = Z95) -> Interval:
    """Return mean(first) - mean(second) on the same questions, with its interval.

    The interval is the adjusted Wald interval for paired proportions (Bonett and Price 2012,
    "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data"): one is added to both kinds of discordant pairs, which keeps the coverage near 95 % for
    small samples.
    """
    assert len(first) == len(second) > 0
    n = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    p12, p21 = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = z * sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    return Interval(
        value=(only_first - only_second) / n,
        low=max(-1.0, p12 - p21 - half),
        high=min(1.0, p12 - p21 + half),
    )


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """One part of a composite score: how many of n are right, and how much the part weighs."""

    correct: int
    n: int
    weight: float


def composite(
    strata: Sequence[Stratum], draws: int = BOOTSTRAP_DRAWS, seed: int = BOOTSTRAP_SEED
) -> Interval:
    """Return the weighted mean of the strata's accuracies with a stratified bootstrap interval.

    Resampling 0/1 outcomes with replacement inside one stratum is a binomial draw, so the whole
    bootstrap is one vector of draws per stratum. The weights must sum to one.
    """
    assert strata and abs(sum(part.weight for part in strata) - 1) < 1e-9
    random = np.random.default_rng(seed)
    scores = np.zeros(draws)
    for part in strata:
        scores += part.weight * random.binomial(part.n, part.correct / part.n, draws) / part.n
    low, high = np.quantile(scores, [0.025, 0.975])
    value = sum(part.weight * part.correct / part.n for part in strata)
    return Interval(value=value, low=float(low), high=float(high))
