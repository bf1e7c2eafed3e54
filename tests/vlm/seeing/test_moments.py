"""Is the moment found that a box in an answer belongs to, and the frame nearest to it?"""

import pytest

from vlm.seeing.boxes import NamedBox, boxes_in
from vlm.seeing.moments import moment_of, nearest_frame

BOX = "[0.1, 0.2, 0.5, 0.8]"
JSON = '"bbox_2d": [100, 200, 500, 800]'


@pytest.mark.parametrize(
    ("answer", "moments"),
    [
        (f"At 1.5 s {BOX}, {BOX}; at 0:07 {BOX}", [1.5, 1.5, 7.0]),
        (f"{BOX} at 3 s", [None]),
        (f"From 1 second to 12.5 seconds: {BOX}", [12.5]),
        (f"<1:02:07.5> the cat {BOX}", [3727.5]),
        (f"3 秒时 {BOX}", [3.0]),
        (f"In 2024 there were 3 cats {BOX}", [None]),
        (f'[{{"time": 2, {JSON}, "label": "cat"}}, {{{JSON}, "timestamp": "00:03.5"}}]', [2, 3.5]),
        (f"At 4 s: {{{JSON}}} and {{{JSON}, 'time': 9.0}}", [4.0, 9.0]),
        (f"{JSON}", [None]),
    ],
)
def test_moments_of_boxes(answer: str, moments: list[float | None]):
    boxes = boxes_in(answer)
    assert [moment_of(answer, box.place) for box in boxes if isinstance(box, NamedBox)] == moments


@pytest.mark.parametrize(
    ("times", "moment", "frame"),
    [
        ([0.0, 1.5, 3.0], 1.0, 1),
        ([0.0, 1.5, 3.0], 4.5, 2),
        ([0.0, 1.5, 3.0], 5.5, None),
        ([0.0, 1.5, 3.0], None, None),
        ([2.0], None, 0),
    ],
)
def test_the_nearest_frame(times: list[float], moment: float | None, frame: int | None):
    assert nearest_frame(times, 4.0, moment) == frame
