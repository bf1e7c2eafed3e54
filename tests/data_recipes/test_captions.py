"""Which records are a picture and its caption, and what does a batch of them hold?"""

import json

import pytest
import torch

from data_recipes.captions import CaptionCollator, CaptionDataset, to_caption
from data_recipes.dataset import Skipped
from data_recipes.mixture import Source
from vlm.caption_tokenizer import count_caption_tokenizer
from vlm.errors import UserError
from vlm.image_processing import VlmImageProcessor
from vlm.image_text_processing import ImageTextProcessor


def turns(*texts):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


ASKED = {"image": "a.png", "conversations": turns("What is <image> this?", " A cat. \n")}
WRITTEN = {"id": 7, "image": ["a.png"], "caption": "A cat."}


@pytest.mark.parametrize("record", [ASKED, WRITTEN])
def test_the_answer_is_the_caption(record):
    caption = to_caption(record, "data.json:3")
    assert (caption.image, caption.text) == ("a.png", "A cat.")
    assert caption.id == str(record.get("id", ""))


FAULTS = {
    "a caption needs one picture and no video, but this has 0": {
        "conversations": turns("What?", "A cat.")
    },
    "a caption needs one picture and no video, but this has 2": {
        "image": ["a.png", "b.png"],
        "conversations": turns("<image><image>", "Cats."),
    },
    "a record's one answer, but this has 2": {
        "image": "a.png",
        "conversations": turns("<image>", "A cat.", "Its colour?", "Grey."),
    },
    "a caption or conversations, this has both": {**ASKED, "caption": "A cat."},
    "(id 7): the caption must be some text": {**WRITTEN, "caption": "  "},
    '(id 7): the caption "A <image>." holds a placeholder': {**WRITTEN, "caption": "A <image>."},
    "but this has 2 picture(s)": {**WRITTEN, "image": ["a.png", "b.png"]},
    "but this has 1 picture(s) and 1 video(s)": {**WRITTEN, "video": "a.mp4"},
    "neither 'caption' nor 'conversations'; it has ['id', 'image']": {**WRITTEN, "caption": None},
    "1 image(s) but 2 <image>": {**ASKED, "conversations": turns("<image><image>", "A cat.")},
    "needs one picture and no video, but this has 0 picture(s)": {"caption": "A cat."},
    "must be a JSON object": "A cat.",
}


@pytest.mark.parametrize("words", FAULTS)
def test_anything_else_is_a_fault_that_says_where(words):
    with pytest.raises(UserError) as error:
        to_caption(FAULTS[words], "data.json:3")
    assert words in str(error.value)
    assert "data.json:3" in str(error.value)


@pytest.fixture
def processor():
    images = VlmImageProcessor(view_size=16, view_token_grid=(1, 4))
    return ImageTextProcessor(images, count_caption_tokenizer(["a red ball", "two"], 40))


@pytest.fixture
def dataset(tmp_path, make_image, processor):
    """(rows, **options) -> a data set; 0.png and 1.png are there."""

    def make(rows, **options):
        for number in range(2):
            make_image(seed=number).save(tmp_path / f"{number}.png")
        (tmp_path / "data.json").write_text(json.dumps(rows))
        source = Source(name="main", path=str(tmp_path / "data.json"))
        return CaptionDataset([source], processor, **{"max_length": 9, **options})

    return make


ROWS = [
    {"id": "x", "image": "0.png", "caption": "a red ball"},
    {"id": "y", "image": "./0.png", "caption": "two"},
    {"id": "z", "image": "1.png", "caption": "A red ball"},
]


def by_id(data):
    return {item["record_id"]: item for item in (data[i] for i in range(len(data)))}


def test_equal_pictures_and_captions_have_equal_numbers(dataset):
    items = by_id(dataset(ROWS))
    x, y, z = (items[name] for name in "xyz")
    assert x["picture"] == y["picture"] != z["picture"]
    assert x["caption"] == z["caption"] != y["caption"]
    assert x["pixel_values"].shape == (1, 3, 16, 16)
    assert x["input_ids"].tolist()[:1] == [2] and len(x["input_ids"]) == 5


def test_draws_follow_seed_and_position_alone(dataset):
    first, again, other = dataset(ROWS), dataset(ROWS), dataset(ROWS, seed=1)
    draws = [first[i]["draws"].tolist() for i in range(6)]
    assert [again[i]["draws"].tolist() for i in (5, 2)] == [draws[5], draws[2]]
    assert other[0]["draws"].tolist() != draws[0]
    flat = [draw for pair in draws for draw in pair]
    assert len(set(flat)) == 12 and all(0 <= draw < 1 for draw in flat)


def test_batch(dataset, processor):
    data, collate = dataset([*ROWS, {"image": "gone.png", "caption": "a"}], on_error="skip"), None
    collate = CaptionCollator(processor)
    items = [data[i] for i in range(4)]
    batch = collate(items)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 5)
    lengths = [len(item["input_ids"]) for item in items if not isinstance(item, Skipped)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["draws"].dtype == torch.float64 and batch["real"].tolist() == [True] * 3
    assert len(batch["record_ids"]) == 3 and "gone.png" in batch["skipped"][0].reason
    nothing = collate(batch["skipped"])
    assert nothing["real"].tolist() == [False] and nothing["record_ids"] == []
    assert nothing["pixel_values"].shape == (1, 3, 16, 16)


def test_caption_that_is_too_long_is_told_not_cut(dataset):
    data = dataset([{"id": "q", "image": "0.png", "caption": "a red ball"}], max_length=4)
    with pytest.raises(UserError, match=r"data.json:1 \(id 'q'\): the caption takes 5 tokens"):
        data[0]


def test_lengths_and_words_without_pictures(dataset):
    rows = [{"image": f"gone{i}.png", "caption": "a red ball"} for i in range(3)]
    data = dataset([*rows, {"caption": "no picture"}])
    assert sorted(data.num_tokens(i) for i in range(4)) == [0, 5, 5, 5]
    assert list(data.texts(9)) == ["a red ball"] * 3
    assert len(list(data.texts(2))) <= 2
