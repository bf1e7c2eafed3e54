"""Are records read as other suites write them, and is what cannot be trained on refused?"""

import pytest

from data_recipes.records import to_messages
from vlm.errors import UserError

ASK, SAY = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}
BARE = {"role": "user", "content": "What?"}
TEXT = {"type": "text", "text": "What?"}


def minicpm(text):
    return [{"role": "user", "content": text}, SAY]


@pytest.mark.parametrize(
    "raw",
    [
        {"image": "a.png", "conversations": [ASK, SAY]},
        {"images": ["a.png"], "messages": [ASK, SAY]},  # ms-swift
        {"image": "a.png", "messages": [ASK, SAY], "videos": [], "objects": None},
        {"image": {"<image_00>": "a.png"}, "conversations": minicpm("<image_00>What?")},
        {"images": ["a.png"], "texts": [{"user": "<image>What?", "assistant": "A cat."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]},
                SAY,
            ]
        },
        {"images": ["a.png"], "messages": [{**ASK, "content": [{"type": "image"}, TEXT]}, SAY]},
        {
            "messages": [
                {**ASK, "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT]},
                {**SAY, "content": [{"type": "text", "text": "A cat."}]},
            ]
        },
    ],
)
def test_forms_of_one_record(raw):
    found = to_messages(raw, "f:1")
    assert found.images == ("a.png",)
    assert found.messages == [
        {"role": "user", "content": [{"type": "image"}, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]


@pytest.mark.parametrize(
    "raw",
    [
        {"video": "a.mp4", "conversations": [{**ASK, "content": "<video>What?"}, SAY]},
        {"video": "a.mp4", "conversations": [ASK, SAY]},  # LLaVA's <image>
        {"videos": ["a.mp4"], "messages": [{**ASK, "content": "<video>What?"}, SAY]},
        {"messages": [{**ASK, "content": [{"type": "video", "video": "a.mp4"}, TEXT]}, SAY]},
        {"videos": ["a.mp4"], "messages": [{**ASK, "content": [{"type": "video"}, TEXT]}, SAY]},
        {
            "messages": [
                {**ASK, "content": [{"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT]},
                SAY,
            ]
        },
    ],
)
def test_forms_of_one_video_record(raw):
    found = to_messages(raw, "f:1")
    assert (found.videos, found.images) == (("a.mp4",), ())
    assert found.messages[0]["content"] == [{"type": "video"}, TEXT]


def test_minicpm_pictures_come_in_the_order_of_their_tags():
    text = "Is <image_01> or <image_00> larger than <image_01>?"
    raw = {"image": {"<image_00>": "a", "<image_01>": "b"}, "conversations": minicpm(text)}
    assert to_messages(raw, "f:1").images == ("b", "a", "b")


def test_nanovlm_rows_show_their_pictures_first():
    texts = [{"user": "What?", "assistant": "A."}, {"user": "And?", "assistant": "B."}]
    found = to_messages({"images": ["a", "b"], "texts": texts}, "f:1", "front_if_missing")
    kinds = [entry["type"] for entry in found.messages[0]["content"]]
    assert kinds == ["image", "text", "image", "text"]
    assert len(found.messages) == 4


FAULTS = {
    "'image' and 'images', which mean the same": {"image": "a", "images": ["a"], "messages": []},
    "'conversations' and 'messages', which mean": {"conversations": [ASK], "messages": [ASK]},
    "needs 'user' and 'assistant'": {"texts": [{"user": "Hi?"}]},
    "<image_01> is not both a key of 'image' and a tag": {
        "image": {"<image_00>": "a", "<image_01>": "b"},
        "conversations": minicpm("<image_00>"),
    },
    "<image_02> is not both": {
        "image": {"<image_00>": "a"},
        "conversations": minicpm("<image_00><image_02>"),
    },
    "in its turns and beside them": {
        "image": "b",
        "messages": [{**ASK, "content": [{"type": "image", "image": "a"}]}, SAY],
    },
    "a turn has the entry": {"messages": [{**ASK, "content": [{"type": "audio"}]}, SAY]},
    "'video' and 'videos', which mean the same": {
        "video": "a.mp4",
        "videos": ["a.mp4"],
        "messages": [BARE, SAY],
    },
    "its videos stand in its turns": {
        "video": "b",
        "messages": [{**ASK, "content": [{"type": "video", "video": "a"}]}, SAY],
    },
    "sounds cannot be trained on": {"audios": ["a.wav"], "messages": [BARE, SAY]},
    "boxes in 'objects'": {"objects": {"bbox": [[0, 0, 1, 1]]}, "messages": [BARE, SAY]},
    "'image' must be a path": {"image": [3], "messages": [ASK, SAY]},
    "1 image(s) but 0 <image>": {"images": ["a"], "messages": [BARE, SAY]},
    "key 'conversations' is missing": {"images": ["a"], "text": "x"},
}


@pytest.mark.parametrize("words", FAULTS)
def test_faults_name_place_and_id(words):
    with pytest.raises(UserError) as error:
        to_messages({"id": "r7", **FAULTS[words]}, "data/f.json:12")
    assert words in str(error.value)
    assert str(error.value).startswith("data/f.json:12 (id 'r7')")
