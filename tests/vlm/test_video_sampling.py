"""Which frames are chosen, of videos of even, slow and uneven rates?"""

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.video_sampling import at_rate, choose_frames, evenly


def even(count: int, rate: float) -> list[float]:
    return [number / rate for number in range(count)]


def milliseconds(count: int, rate: float) -> list[float]:
    """As Matroska rounds them."""
    return [round(1000 * number / rate) / 1000 for number in range(count)]


UNEVEN = [0.0, 0.1, 0.2, 0.3, 5.0, 5.1, 10.0]  # long stills

TABLE = [
    # times, sampling, chosen
    (even(10, 25), {"num_frames": 4}, [0, 3, 6, 9]),
    (even(10, 25), {"num_frames": 1}, [0]),
    (even(10, 25), {"num_frames": 2}, [0, 9]),
    (even(3, 25), {"num_frames": 8}, [0, 1, 2]),
    (even(1, 25), {"num_frames": 8}, [0]),
    (even(10, 25), {"num_frames": 8, "max_frames": 4}, [0, 3, 6, 9]),
    (even(5, 25), {}, [0, 1, 2, 3, 4]),
    (even(5, 25), {"max_frames": 3}, [0, 2, 4]),
    (even(100, 25), {"fps": 1}, [0, 25, 50, 75]),
    (even(101, 25), {"fps": 1}, [0, 25, 50, 75, 100]),
    (even(100, 25), {"fps": 2.5}, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
    (even(31, 30), {"fps": 2}, [0, 15, 30]),
    (milliseconds(31, 30), {"fps": 3}, [0, 10, 20, 30]),
    (milliseconds(31, 30), {"num_frames": 4}, [0, 10, 20, 30]),
    # slower than the sampling, and between half of it and it: the stride that became 0
    (even(4, 0.4), {"fps": 1}, [0, 1, 2, 3]),
    (even(4, 1.6), {"fps": 2}, [0, 1, 2, 3]),
    (even(6, 3), {"fps": 2}, [0, 1, 3, 4]),
    (even(100, 25), {"fps": 5, "max_frames": 4}, [0, 33, 66, 99]),
    (even(100, 25), {"fps": 1, "max_frames": 4}, [0, 25, 50, 75]),
    (even(5, 25), {"fps": 1e12}, [0, 1, 2, 3, 4]),
    # what is shown when
    (UNEVEN, {"fps": 1}, [0, 3, 4, 5, 6]),
    (UNEVEN, {"num_frames": 3}, [0, 4, 6]),
    (UNEVEN, {"num_frames": 5}, [0, 3, 4, 5, 6]),
    ([7.0 + time for time in UNEVEN], {"num_frames": 3}, [0, 4, 6]),
]


@pytest.mark.parametrize(("times", "sampling", "chosen"), TABLE)
def test_chosen_frames(times, sampling, chosen):
    assert choose_frames(times, **sampling) == chosen


@pytest.mark.parametrize("total", [2, 31, 100, 999])
@pytest.mark.parametrize("count", [2, 7, 8, 32])
def test_even_videos_give_llavas_linspace(total, count):
    expected = np.linspace(0, total - 1, min(count, total), dtype=int).tolist()
    assert evenly(even(total, 25), count) == expected


def test_a_rate_gives_what_is_shown_at_each_tick():
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.cumsum(rng.exponential(1.0, rng.integers(1, 30)))
        fps = float(rng.uniform(0.1, 5))
        end = times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)
        ticks = times[0] + np.arange(1000) / fps
        ticks = ticks[(ticks < end - 1e-3) | (ticks == times[0])]
        shown = np.unique(np.searchsorted(times, ticks + 1e-3, side="right") - 1)
        assert at_rate(times.tolist(), fps) == shown.tolist()


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"num_frames": 0}, "num_frames of a video must be above 0, not 0"),
        ({"fps": -1.0}, "fps of a video must be above 0"),
        ({"fps": float("nan")}, "fps of a video must be above 0, not nan"),
        ({"max_frames": 0}, "max_frames"),
        ({"num_frames": 4, "fps": 1}, "give one of them"),
    ],
)
def test_samplings_that_mean_nothing(sampling, words):
    with pytest.raises(UserError, match=words):
        choose_frames(even(5, 25), **sampling)
