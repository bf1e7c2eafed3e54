"""Which moment of a video does an answer speak of where it names a box?

| written                                          | whose                                |
|--------------------------------------------------|--------------------------------------|
| `{"time": 1.5, "bbox_2d": [...]}`, `"timestamp"` | Qwen3-VL's JSON, in its object       |
| `00:07`, `1:02:07.5`                             | a clock, before the box              |
| `1.5 s`, `1.5s`, `2 seconds`, `2 秒`             | seconds, before the box              |
"""

import re
from collections.abc import Sequence

KEY = r"(?P<key>\btime(?:stamp)?[\"']?\s*[:=]\s*[\"']?)?"
CLOCK = r"(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d\d(?:\.\d+)?)(?![\d:])"
PLAIN = r"(?P<plain>\d+(?:\.\d+)?)(?P<unit>\s*(?:s|secs?|seconds?)\b|\s*秒)?"
TIME = re.compile(rf"{KEY}(?<![\d.:])(?:{CLOCK}|{PLAIN})", re.I)


def moment_of(answer: str, place: int) -> float | None:
    """Return the seconds of the moment that a box belongs to; None: the answer names none.

    Args:
        answer: what the model wrote.
        place: where in it the box begins.

    >>> moment_of("At 0:07 [0.1, 0.1, 0.5, 0.5]", 8)
    7.0
    """
    opened, closed = answer.rfind("{", 0, place), answer.rfind("}", 0, place)
    if opened > closed:  # within an object of JSON, whose keys have any order
        end = answer.find("}", place)
        inside = _times(answer[opened : end if end >= 0 else len(answer)])
        if inside:
            return inside[0]
    before = _times(answer[:place])
    return before[-1] if before else None


def nearest_frame(times: Sequence[float], duration: float, moment: float | None) -> int | None:
    """Return the frame nearest to a moment; None: the video has no such moment, or nobody knows.

    Args:
        times: of the frames, in seconds.
        duration: of the video; a moment up to a second behind it is its end.
        moment: in seconds; of a video of one frame it does not matter.
    """
    if len(times) == 1:
        return 0
    if moment is None or moment > duration + 1:
        return None
    return min(range(len(times)), key=lambda frame: abs(times[frame] - moment))


def _times(text: str) -> list[float]:
    """Return the times that a text names, in seconds; a number alone is none."""
    times = []
    for match in TIME.finditer(text):
        if match["minutes"]:
            whole = 3600 * int(match["hours"] or 0) + 60 * int(match["minutes"])
            times.append(whole + float(match["seconds"]))
        elif match["key"] or match["unit"]:
            times.append(float(match["plain"]))
    return times
