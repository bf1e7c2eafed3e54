"""Which frames of a video are looked at? Pure functions of the frames' times.

Two traps of LLaVA-NeXT's `process_video_with_decord` are avoided: its stride round(rate / fps) is 0
where a video is slower than twice the sampling, and its times are divided by that stride. Here the
time decides, so frames of any rate, also one that varies, are found by when they are shown.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from vlm.errors import UserError

# Files round times to 1/1000 s (Matroska): frame 20 of 30 a second stands at 0.667, not at 2/3.
TOLERANCE = 1e-3


def choose_frames(
    times: Sequence[float],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> list[int]:
    """Return the numbers of the chosen frames, rising, each at most once.

    `num_frames` are spread evenly over the video, first and last included (all, if it has no more);
    `fps` takes what is shown at the first frame's time and every 1/fps seconds after; neither takes
    every frame. Where that is more than `max_frames`, so many are spread evenly instead.

    Args:
        times: of the frames, in seconds, rising.
        num_frames: how many.
        fps: how many a second.
        max_frames: how many at most.

    Raises:
        UserError: both are given, or a number that is not positive.
    """
    check_sampling(num_frames, fps, max_frames)
    if num_frames is not None:
        return evenly(times, min(num_frames, max_frames or num_frames))
    chosen = list(range(len(times))) if fps is None else at_rate(times, fps)
    if max_frames is not None and len(chosen) > max_frames:
        return evenly(times, max_frames)
    return chosen


def evenly(times: Sequence[float], count: int) -> list[int]:
    """Return frames at `count` times that divide the video evenly, first and last included.

    Where frames are evenly spaced these are LLaVA-NeXT's `linspace(0, len - 1, count)`, cut to
    whole numbers; a frame that is shown for long is taken once.
    """
    if len(times) <= count:
        return list(range(len(times)))
    if count == 1:
        return [0]
    first, length = times[0], times[-1] - times[0]
    return _shown(times, [first + length * number / (count - 1) for number in range(count)])


def at_rate(times: Sequence[float], fps: float) -> list[int]:
    """Return the frames shown `fps` times a second from the first on; those of a slower video once.

    The last frame counts as shown for the mean time of the others. A frame is taken if a tick falls
    into its time, so the cost is that of the frames, however many ticks there are.
    """
    if len(times) == 1:
        return [0]
    since = np.asarray(times, dtype=np.float64) - times[0]
    until = np.append(since[1:], since[-1] + since[-1] / (len(since) - 1))
    first_tick = np.maximum(0, np.ceil((since - TOLERANCE) * fps))
    return np.flatnonzero(np.ceil((until - TOLERANCE) * fps) > first_tick).tolist()


def _shown(times: Sequence[float], moments: Sequence[float]) -> list[int]:
    """Return the frames that are shown at some moments, each once."""
    places = (max(0, bisect_right(times, moment + TOLERANCE) - 1) for moment in moments)
    return list(dict.fromkeys(places))


def check_sampling(num_frames: int | None, fps: float | None, max_frames: int | None) -> None:
    """Refuse two samplings at once and numbers that mean nothing.

    Raises:
        UserError: always with the value.
    """
    if num_frames is not None and fps is not None:
        raise UserError(
            f"a video is sampled by num_frames ({num_frames}) or by fps ({fps:g}); give one of them"
        )
    for name, value in (("num_frames", num_frames), ("fps", fps), ("max_frames", max_frames)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} of a video must be above 0, not {value}")
