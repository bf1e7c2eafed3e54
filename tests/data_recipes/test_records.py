"""Are valid records split into messages, and does each fault name the file, the line and the id?"""

import pytest

from data_recipes.records import split_placeholders, to_messages
from vlm.errors import UserError

IMAGE, NEWLINE_TEXT = {"type": "image"}, {"type": "text", "text": "\nWhat?"}


def record(*turns, **keys):
    pairs = [{"from": who, "value": text} for who, text in turns]
    return {"id": "r7", "conversations": pairs, **keys}


def test_llava_record():
    found = to_messages(
        record(("human", "<image>\nWhat?"), ("gpt", "A cat."), image="a/b.jpg"), "f.json:3"
    )
    assert found.id == "r7"
    assert found.images == ("a/b.jpg",)
    assert found.messages == [
        {"role": "user", "content": [IMAGE, NEWLINE_TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]


def test_role_content_system_turn_and_several_images():
    raw = {
        "image": ["1.png", "2.png"],
        "conversations": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "<image> or <image>?"},
            {"role": "assistant", "content": "The second."},
        ],
    }
    found = to_messages(raw, "f.json:3")
    assert found.id == ""
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    text = [{"type": "text", "text": piece} for piece in (" or ", "?")]
    assert found.messages[1]["content"] == [IMAGE, text[0], IMAGE, text[1]]


def test_text_only():
    assert to_messages(record(("human", "Hi"), ("gpt", "Hello")), "f:1").images == ()


@pytest.mark.parametrize(
    ("position", "text", "entries"),
    [
        ("as_written", "What?\n<image>", [{"type": "text", "text": "What?\n"}, IMAGE]),
        ("first", "What?\n<image>", [IMAGE, NEWLINE_TEXT]),
        ("first", "<image>\nWhat?", [IMAGE, NEWLINE_TEXT]),
        ("none", "<image>\nWhat?", [{"type": "text", "text": "What?"}]),
        ("front_if_missing", "What?", [IMAGE, NEWLINE_TEXT]),
        ("front_if_missing", "What?<image>", [{"type": "text", "text": "What?"}, IMAGE]),
    ],
)
def test_image_position(position, text, entries):
    raw = record(("human", text), ("gpt", "A cat."), image="a.jpg")
    assert to_messages(raw, "f:1", position).messages[0]["content"] == entries


def test_without_pictures_nothing_is_loaded():
    raw = record(("human", "<image>\nWhat?"), ("gpt", "A cat."), image="a.jpg")
    assert to_messages(raw, "f:1", "none").images == ()
    raw = record(("human", "<image>"), ("gpt", "A cat."), image="a.jpg")
    with pytest.raises(UserError, match="nothing but a picture"):
        to_messages(raw, "f:1", "none")


def test_split_keeps_every_character():
    text = "a <image><image>\n b"
    pieces = [entry.get("text", "<image>") for entry in split_placeholders(text)]
    assert "".join(pieces) == text


Q, A = ("human", "Why?"), ("gpt", "Because.")
FAULTS = {
    "no object": (["list"], "must be a JSON object"),
    "no conversations": ({"id": "r7", "text": "x"}, "key 'conversations' is missing"),
    "empty conversation": (record(), "at least one question"),
    "unknown role": (record(("robot", "Hi"), A), 'turn 1 has role "robot"'),
    "turn without text key": (
        {"id": "r7", "conversations": [{"from": "human"}]},
        "turn 1 has no 'value'",
    ),
    "empty turn": (record(Q, ("gpt", " \n")), "turn 2 must have some text"),
    "text is no string": (record(Q, ("gpt", 3)), "turn 2 must have some text, not 3"),
    "answer first": (record(A, Q, A), "turn 1 must be the user's"),
    "two questions": (record(Q, Q, A), "turn 2 must be the assistant's"),
    "two questions after a system turn": (
        record(("system", "s"), Q, Q),
        "turn 3 must be the assistant's",
    ),
    "late system turn": (record(Q, A, ("system", "s")), "turn 3 must be the user's"),
    "no answer": (record(Q), "no answer"),
    "question at the end": (record(Q, A, Q), "no answer"),
    "image without placeholder": (record(Q, A, image="a.png"), "1 image(s) but 0 <image>"),
    "placeholder without image": (record(("human", "<image>?"), A), "0 image(s) but 1 <image>"),
    "more images": (
        record(("human", "<image>"), A, image=["a", "b"]),
        "2 image(s) but 1 <image>",
    ),
    "more placeholders": (
        record(("human", "<image><image>"), A, image="a"),
        "1 image(s) but 2 <image>",
    ),
    "placeholder in an answer": (
        record(Q, ("gpt", "<image>"), image="a"),
        "only the user's turns can show an image",
    ),
    "image is no path": (record(Q, A, image=3), "'image' must be a path"),
    "empty path": (record(Q, A, image=""), "'image' must be a path"),
    "video without a placeholder": (
        record(Q, A, video="a.mp4"),
        "1 video(s) but 0 <video> placeholder(s)",
    ),
    "<image> for video and image": (
        record(("human", "<image><image>"), A, image="a", video="b"),
        "1 image(s) but 2 <image>",
    ),
    "more videos": (
        record(("human", "<video>"), A, video=["a", "b"]),
        "2 video(s) but 1 <video>",
    ),
    "video in an answer": (
        record(("human", "<video>?"), ("gpt", "<video>"), video="a"),
        "only the user's turns can show a video",
    ),
    "Qwen-VL's picture": (
        record(("human", "<img>0.png</img>What?"), A),
        "holds '<img>0.png</img>'",
    ),
    "MiniCPM's picture": (record(("human", "<image_00>What?"), A), "holds '<image_00>'"),
    "MiniCPM's tag beside a picture": (
        record(("human", "<image_00>?"), A, image="a"),
        "<image_00>",
    ),
    "half a character": (record(("human", "a\ud800"), A), "turn 1 holds half a character"),
    "a key like image": (record(Q, A, imgs=["a"]), "'imgs' is not read; call it 'image'"),
    "a key in capitals": (record(Q, A, Image="a"), "'Image' is not read; call it 'image'"),
    "a key like video": (record(Q, A, video_path="a"), "'video_path' is not read; call it 'video'"),
    "an address": (
        record(("human", "<image>?"), A, image="https://a.org/b.png"),
        "is no path; nothing is fetched",
    ),
    "a picture as text": (
        record(("human", "<image>?"), A, image="data:image/png;base64,AA"),
        "save it as a file",
    ),
    "a long path": (
        record(("human", "<image>?"), A, image="a" * 5000),
        "a path of 5000 characters",
    ),
    "no video": (record(("human", "<video>\nWhat?"), A), "0 video(s) but 1 <video> placeholder(s)"),
    "no video among images": (
        record(("human", "<image><video>"), A, image="a"),
        "0 video(s) but 1 <video> placeholder(s)",
    ),
    "no video, and it is text": (record(Q, ("gpt", "Close <video>.")), "such as &lt;video&gt;"),
    "captions alone": (
        {"id": "r7", "image": "a", "caption": "A cat."},
        "captions alone are for a Q-Former",
    ),
    "video is no path": (record(Q, A, video={"bytes": 3}), "'video' must be a path"),
    "part of a video": (record(Q, A, video="a", clip=[0, 3]), "'clip'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_place_and_id(name):
    raw, expected = FAULTS[name]
    with pytest.raises(UserError) as error:
        to_messages(raw, "data/f.json:12")
    assert expected in str(error.value)
    assert str(error.value).startswith("data/f.json:12")
    if isinstance(raw, dict):
        assert "(id 'r7')" in str(error.value)


def test_place_is_not_computed_for_good_records():
    class Slow:
        def __str__(self):
            raise AssertionError("counting lines for every record would be quadratic")

    to_messages(record(Q, A), Slow())


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


@pytest.mark.parametrize(
    ("text", "media", "position", "content", "images", "videos"),
    [
        ("<video>\nWhat?", {"video": "a.mp4"}, "as_written", [VIDEO, "\nWhat?"], 0, 1),
        ("<image>\nWhat?", {"video": "a.mp4"}, "as_written", [VIDEO, "\nWhat?"], 0, 1),
        (
            "<image> then <video> and <image>?",
            {"video": ["a.mp4"], "image": ["0.png", "1.png"]},
            "as_written",
            [IMAGE, " then ", VIDEO, " and ", IMAGE, "?"],
            2,
            1,
        ),
        ("What?<video>", {"video": "a.mp4"}, "first", [VIDEO, "\nWhat?"], 0, 1),
        ("What?", {"video": ["a", "b"]}, "front_if_missing", None, 0, 2),
        ("<video>\nWhat?", {"video": "a.mp4"}, "none", ["What?"], 0, 0),
    ],
)
def test_videos(text, media, position, content, images, videos):
    read = to_messages(record(("human", text), A, **media), "f:1", position)
    if content is None:
        content = [VIDEO, "\n", VIDEO, "\nWhat?"]
    expected = [{"type": "text", "text": e} if isinstance(e, str) else e for e in content]
    assert read.messages[0]["content"] == expected
    assert (len(read.images), len(read.videos)) == (images, videos)
