"""Does each part of what was looked at become a picture with words, or a sentence?"""

import re

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

from connectors.base import TokenCells
from demo.seeing.answer_boxes import boxes_html
from demo.seeing.looked import Choice, Looked, heat_html, options_html, tiles_html
from demo.seeing.options_figure import _apart
from demo.wording import LANGUAGES
from vlm.image_processing import VlmImageProcessor
from vlm.seeing.answer_attention import AnswerAttention
from vlm.seeing.option_depth import OptionDepth
from vlm.seeing.token_places import token_places
from vlm.seeing.words import Word
from vlm.tiling import build_tiling, plan_of
from vlm.video import SampledVideo

SIZE = (80, 40)
NO_OPTIONS = "The question has no options"


def looked(answer="A cat.", attention="no_places", options="no_options"):
    return Looked((Image.new("RGB", SIZE, "teal"),), answer, attention, options)


def alt(html: str) -> str:
    found = re.findall(r'<img src="data:image/webp;base64,[^"]+" alt="([^"]+)">', html)
    assert len(found) == 1, html[:200]
    return found[0]


def test_the_map_tells_where_and_of_which_words():
    cells = TokenCells(2, 2, (0, 1, 2, 3))
    tiling = build_tiling({"type": "resize"})
    places = token_places(SIZE, tiling, 32, (2, 2), cells, tiling.plan(*SIZE, 32))
    weights = torch.zeros(2, 1, 2, 4, dtype=torch.float16)
    weights[:, :, 0, 1] = 0.25  # the first word looks at the top right
    weights[:, :, 1, 2] = 0.5  # the second at the bottom left
    words = (Word("<A>", 0, 1), Word("cat", 1, 2))
    seen = looked(attention=AnswerAttention(words, weights, (places,), (SIZE,)))
    first = heat_html(seen, 0, Choice(words=[0]), "en")
    assert "picture 1 for “&lt;A&gt;”: strongest at the top right." in alt(first)
    assert "25% of its attention" in first and "<A>" not in first
    whole = heat_html(seen, 0, Choice(), "en")
    assert "the whole answer" in alt(whole) and "38%" in whole and "bottom left" in whole
    assert "在左下最强" in alt(heat_html(seen, 0, Choice(words=[1], layer=1, head=0), "zh"))


@pytest.mark.parametrize("tiling", ["resize", "pad", "anyres", "dynamic", "hd"])
def test_tiles_tell_the_count(tiling):
    processor = VlmImageProcessor(32, (4, 4), {"type": tiling})
    html = tiles_html(looked(), 0, processor, "en")
    count = processor.num_tokens(SIZE)
    assert f" = {count}." in html and f"tiling {tiling}" in html
    rows, cols = processor.plan(SIZE).grid
    assert alt(html).startswith(f"Picture 1 cut into {rows} × {cols} tiles")
    assert ("Orange" in html) == (tiling in ("anyres", "hd"))


def test_the_frames_of_a_video_are_drawn_with_their_times():
    processor = VlmImageProcessor(32, (4, 4), {"type": "resize"})
    frames = (Image.new("RGB", SIZE, "teal"),) * 3
    video = SampledVideo(frames, (0.0, 1.5, 3.0), 4.0, 100)
    tiling, cells = build_tiling({"type": "resize"}), TokenCells(4, 4, tuple(range(16)))
    grids = (32, (4, 4), cells, plan_of(tiling, (0, 3)), processor.video_config)
    places = token_places(SIZE, tiling, *grids)
    weights = torch.zeros(1, 1, 1, 12)  # 2 x 2 tokens of each frame are left
    weights[..., 7] = 0.5
    attention = AnswerAttention((Word("cat", 0, 1),), weights, (places,), (SIZE,))
    seen = Looked((video,), "[0.1, 0.1, 0.5, 0.5]", attention, "no_options")
    html = heat_html(seen, 0, Choice(), "en")
    assert "strongest at the bottom right, at 1.5 s." in alt(html) and "50%" in html
    html = tiles_html(seen, 0, processor, "en")
    assert "3 frames, each 2 × 2 tokens: 12 tokens in all." in html and "3 frames" in alt(html)
    assert "boxes without a time" in boxes_html(seen, 0, processor, "en")
    assert "<img" not in boxes_html(seen, 0, processor, "en")


@pytest.mark.parametrize("tiling", ["resize", "pad"])
def test_boxes_are_drawn_on_the_frame_of_their_moment(tiling):
    processor = VlmImageProcessor(32, (4, 4), {"type": tiling})
    frames = (Image.new("RGB", SIZE, "teal"),) * 3
    video = SampledVideo(frames, (0.0, 1.5, 3.0), 4.0, 100)
    answer = (
        "At 0:01.4 <ref>the cat</ref><box>[[100,300,900,700]]</box> and 2.9 s "
        "<ref>mat</ref><box>[[100,300,900,700]]</box>, 99 s [[100,300,900,700]] [[1,2]]"
    )
    html = boxes_html(Looked((video,), answer, "no_places", "no_options"), 0, processor, "en")
    assert re.findall(r'alt="([^"]+)"', html) == [
        "Video 1 at 1.5 s with the boxes of the answer: 1 the cat.",
        "Video 1 at 3.0 s with the boxes of the answer: 1 mat.",
    ]
    assert "with one that the video does not have" in html and "[[1,2]] is no box" in html
    assert ("padded square" in html) == (tiling == "pad")
    one = SampledVideo(frames[:1], (0.0,), 4.0, 100)
    only = Looked((one,), "[0.1, 0.4, 0.5, 0.6]", "no_places", "no_options")
    assert "视频 1 的 0.0 秒处" in alt(boxes_html(only, 0, processor, "zh"))


def test_boxes_are_drawn_and_faults_told():
    stretched = VlmImageProcessor(32, (4, 4), {"type": "resize"})
    padded = VlmImageProcessor(32, (4, 4), {"type": "pad"})
    answer = "<ref>a <b>cat</b></ref><box>[[100,100,900,900]]</box> and [[1,2,3]]"
    html = boxes_html(looked(answer), 0, stretched, "en")
    assert alt(html) == "Picture 1 with the boxes of the answer: 1 a &lt;b&gt;cat&lt;/b&gt;."
    assert "[[1,2,3]] is no box: it needs four numbers." in html and "<b>" not in html
    assert "padded square" not in html
    assert "padded square" in boxes_html(looked(answer), 0, padded, "en")
    above = boxes_html(looked("[0.1, 0.0, 0.5, 0.2]"), 0, padded, "en")
    assert "in its padding" in above and "<img" not in above
    assert "The answer names no boxes." in boxes_html(looked(), 0, stretched, "en")


def test_options_tell_their_ends():
    scores = torch.tensor([[0.0, 0.0], [0.0, -100.0]])
    depth = OptionDepth(("left", "right"), scores, "it is left, so (", 0)
    html = options_html(looked(options=depth), "en")
    assert alt(html).endswith("at the end (A) left: 100%, (B) right: 0%.")
    assert "began with “it is left, so”." in html
    assert NO_OPTIONS in options_html(looked(), "en")
    assert "连接器不保留位置" in heat_html(looked(), 0, Choice(), "zh")


def test_labels_stand_apart_in_their_order():
    import numpy as np

    places = np.array([0.5, 0.51, 0.0, 1.0, 0.99])
    moved = _apart(places)
    assert np.array_equal(np.argsort(moved), np.argsort(places))
    assert np.diff(np.sort(moved)).min() > 0.05 and moved.max() <= 1.0


def test_both_languages_say_everything_with_the_same_values():
    english, chinese = LANGUAGES["en"], LANGUAGES["zh"]
    assert english.keys() == chinese.keys()
    for key in english:
        values = [sorted(re.findall(r"\{(\w+)\}", text[key])) for text in (english, chinese)]
        assert values[0] == values[1], key
