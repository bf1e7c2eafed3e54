"""Are boxes read in every format, put where they belong, and is the rest told?"""

import pytest

from vlm.seeing.boxes import NamedBox, NotABox, boxes_in, on_image

WHOLE = (0.1, 0.2, 0.5, 0.8)
TABLE = [
    ("It is at [0.1, 0.2, 0.5, 0.8].", [(WHOLE, "")]),
    ("[0.10,0.20,0.50,0.80] and [0.3,0.3,0.4,0.4]", [(WHOLE, ""), ((0.3, 0.3, 0.4, 0.4), "")]),
    ("<ref>the dog</ref><box>(100,200),(500,800)</box>", [(WHOLE, "the dog")]),
    ("<box>(100,200),(500,800)</box>", [(WHOLE, "")]),
    ("a dog(100,200),(500,800)", [(WHOLE, "")]),
    (
        "<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(100,200),(500,800)<|box_end|>",
        [(WHOLE, "a cup")],
    ),
    (
        "<ref>cat</ref><box>[[100, 200, 500, 800]]</box> by <ref>a mat</ref>"
        "<box>[[0,0,1000,1000],[100,200,500,800]]</box>",
        [(WHOLE, "cat"), ((0, 0, 1, 1), "a mat"), (WHOLE, "a mat")],
    ),
    ("The cup [[100,200,500,800]] stands.", [(WHOLE, "")]),
    ("two [[100,200,500,800;000,000,999,999]]", [(WHOLE, ""), ((0, 0, 0.999, 0.999), "")]),
    ("[[0.1,0.2,0.5,0.8]]", [(WHOLE, "")]),
    (
        "<loc0256><loc0128><loc0512><loc0768> red cat ; <loc0000><loc0000><loc1023><loc1023> mat",
        [((0.125, 0.25, 0.75, 0.5), "red cat"), ((0, 0, 1023 / 1024, 1023 / 1024), "mat")],
    ),
    (
        "car<loc_100><loc_200><loc_500><loc_800>door handle<loc_0><loc_0><loc_999><loc_999>",
        [(WHOLE, "car"), ((0, 0, 0.999, 0.999), "door handle")],
    ),
    (
        '```json\n[{"bbox_2d": [100, 200, 500, 800], "label": "a cat"},\n'
        '{"label": "mat", "bbox_2d": [0, 0, 1000, 1000]}, {"bbox_2d": [100, 200, 500, 800]}]\n```',
        [(WHOLE, "a cat"), ((0, 0, 1, 1), "mat"), (WHOLE, "")],
    ),
    ("No box here, see [1] and [2, 3] (in 2024).", []),
    ("", []),
]
FAULTY = [
    ("[0.5, 0.2, 0.1, 0.8]", "[0.5, 0.2, 0.1, 0.8]", "empty"),
    ("[12, 30, 50, 90]", "[12, 30, 50, 90]", "range"),
    ("[[100,200,500]]", "[[100,200,500]]", "count"),
    ("[[100,200,500,1200]]", "[[100,200,500,1200]]", "range"),
    ("<box>(100,200),(100,800)</box>", "(100,200),(100,800)", "empty"),
    ("<box>somewhere</box>", "<box>somewhere</box>", "count"),
    ("<loc0256><loc0128><loc0512> cat", "<loc0256><loc0128><loc0512>", "count"),
    ("[-0.1, 0.2, 0.5, 0.8]", "[-0.1, 0.2, 0.5, 0.8]", "range"),
]


@pytest.mark.parametrize(("answer", "wanted"), TABLE)
def test_formats(answer, wanted):
    assert boxes_in(answer) == [NamedBox(pytest.approx(box), name) for box, name in wanted]


@pytest.mark.parametrize(("answer", "written", "fault"), FAULTY)
def test_what_is_no_box_is_told_and_does_not_hide_others(answer, written, fault):
    assert boxes_in(answer) == [NotABox(written, fault)]
    both = boxes_in(f"{answer} and <box>[[100,200,500,800]]</box>")
    assert both == [NotABox(written, fault), NamedBox(pytest.approx(WHOLE), "")]


@pytest.mark.parametrize(
    ("corners", "shown", "wanted"),
    [
        (WHOLE, None, (20, 20, 100, 80)),
        ((0, 0, 1, 1), (0, -50, 200, 150), (0, 0, 200, 100)),  # a padded square of 200 pixels
        ((0.25, 0.5, 0.75, 0.75), (0, -50, 200, 150), (50, 50, 150, 100)),
        ((0.1, 0.0, 0.5, 0.2), (0, -50, 200, 150), None),  # padding alone
    ],
)
def test_boxes_in_pixels(corners, shown, wanted):
    made = on_image(corners, (200, 100), shown)
    assert made == (None if wanted is None else pytest.approx(wanted))
