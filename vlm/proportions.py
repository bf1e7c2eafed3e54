"""How sure are we of a share that was counted? Its 95 % interval."""

from dataclasses import dataclass
from math import sqrt

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, n: int, z: float = Z95) -> Interval:
    """Return the share `correct / n` with its Wilson score interval (Wilson 1927).

    Unlike the normal interval it stays inside [0, 1] and is honest at 0/n and n/n.
    """
    assert 0 <= correct <= n and n > 0, f"{correct} correct of {n}"
    share = correct / n
    centre = share + z * z / (2 * n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The bounds at 0/n and n/n are 0 and 1 in exact arithmetic; say so without rounding dust.
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == n else (centre + half) / scale
    return Interval(value=share, low=low, high=high)
