"""Is a saved conversation a training record, and does it come back as it was?"""

import json
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data_recipes.records import to_messages
from demo.limits import Limits
from demo.saved import MAX_RECORD, pack, unpack
from demo.uploads import keep_file, keep_picture
from vlm.chat_session import ChatSession, Sampling
from vlm.errors import UserError
from vlm.video import SampledVideo

LIMITS = Limits(max_file_mb=1, max_megapixels=1, max_pictures=3)


@pytest.fixture
def chat(make_model, make_image, tmp_path: Path) -> ChatSession:
    """Three questions, of which the second was stopped before a word; two pictures each in 0, 1."""
    session = ChatSession(*make_model(), Sampling(max_new_tokens=2), system="Be brief.")
    for turn, (answer, num) in enumerate((("A cat.", 2), ("", 1), ("Yes.", 0))):
        for number in range(num):
            source = tmp_path / f"{turn}{number}.png"
            make_image(seed=10 * turn + number).save(source)
            path, image = keep_picture(source, "x", tmp_path, LIMITS, "en")
            session.add_image(image, name=path)
        list(session.ask(f"Question\n{turn}?"))
        session.messages[-1]["content"][0]["text"] = answer
    return session


@pytest.fixture
def empty(make_model) -> ChatSession:
    return ChatSession(*make_model(), Sampling())


def test_a_video_is_kept_with_the_pictures_and_comes_back(
    empty: ChatSession, make_clip, make_image, tmp_path: Path
):
    make_image().save(tmp_path / "cat.png")
    make_clip(tmp_path / "clip.mp4", 20)
    for name in ("cat.png", "clip.mp4", "cat.png"):
        empty.waiting.append(keep_file(tmp_path / name, name, empty, tmp_path, LIMITS, "en"))
    list(empty.ask("What happens?"))
    empty.messages[-1]["content"][0]["text"] = "Stripes move."
    assert pack(empty, tmp_path / "talk.zip")
    with zipfile.ZipFile(tmp_path / "talk.zip") as archive:
        (raw,) = json.loads(archive.read("conversation.json"))
    record = to_messages(raw, "talk")
    assert record.images == ("pictures/1.png", "pictures/3.png")
    assert record.videos == ("videos/2.mp4",)
    restored = unpack(tmp_path / "talk.zip", empty, tmp_path, LIMITS, "en")
    assert restored.messages == empty.messages
    (_, picture), (_, video), _ = restored.images
    assert isinstance(video, SampledVideo) and isinstance(picture, Image.Image)
    assert [frame.tobytes() for frame in video.frames] == [
        frame.tobytes() for frame in empty.images[1][1].frames
    ]


def test_what_is_saved_is_a_record_that_training_takes(chat: ChatSession, tmp_path: Path):
    assert pack(chat, tmp_path / "talk.zip")
    with zipfile.ZipFile(tmp_path / "talk.zip") as archive:
        archive.extractall(tmp_path / "talk")
    (raw,) = json.loads((tmp_path / "talk" / "conversation.json").read_text())
    record = to_messages(raw, "talk")
    assert [m["role"] for m in record.messages] == ["system"] + ["user", "assistant"] * 2
    assert record.images == ("pictures/1.png", "pictures/2.png")
    assert all((tmp_path / "talk" / str(name)).is_file() for name in record.images)


def test_a_conversation_comes_back_as_it_was(chat: ChatSession, tmp_path: Path):
    assert pack(chat, tmp_path / "talk.zip")
    restored = unpack(tmp_path / "talk.zip", chat, tmp_path, LIMITS, "en")
    kept = [message for n, message in enumerate(chat.messages) if n not in (3, 4)]
    assert restored.messages == kept and restored.system == "Be brief."
    assert [image.tobytes() for _, image in restored.images] == [
        image.tobytes() for _, image in chat.images[:2]
    ]
    assert not list(tmp_path.glob("given-*"))


def test_nothing_answered_is_nothing_to_save(make_model, tmp_path: Path):
    session = ChatSession(*make_model(), Sampling(), system="Be brief.")
    assert not pack(session, tmp_path / "talk.zip")


def wide() -> bytes:
    stream = BytesIO()
    Image.new("RGB", (1001, 1000)).save(stream, "PNG")
    return stream.getvalue()


RECORD = {
    "image": "pictures/1.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
    ],
}


def of_media(value: str, **media: object) -> dict[str, bytes]:
    """A zip with a question that shows `value`, and a small picture under every name."""
    turns = [{"from": "human", "value": f"{value}\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    stream = BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    names = ("a.png", "b.png", "v.gif", "v.mp4")
    return {"conversation.json": json.dumps({"conversations": turns} | media).encode()} | (
        dict.fromkeys(names, stream.getvalue())
    )


FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "no record": ({"a.txt": b"x"}, "conversation.json is missing in the zip."),
    "no JSON": ({"conversation.json": b"{"}, "no saved conversation"),
    "deep JSON": ({"conversation.json": b"[" * 100_000}, "no saved conversation"),
    "large JSON": ({"conversation.json": b" " * (MAX_RECORD + 1)}, "larger than the 4 MB"),
    "two records": (
        {"conversation.json": json.dumps([RECORD, RECORD]).encode()},
        "holds 2 conversations",
    ),
    "no answer": (
        {"conversation.json": json.dumps({"conversations": RECORD["conversations"][:1]}).encode()},
        "the last question has no answer",
    ),
    "no picture": (
        {"conversation.json": json.dumps(RECORD).encode()},
        "pictures/1.png is missing in the zip.",
    ),
    "a path outside": (
        {"conversation.json": json.dumps(RECORD | {"image": "/etc/passwd"}).encode()},
        "/etc/passwd is missing in the zip.",
    ),
    "a video of frames": (
        of_media("<video>", video=[["a.png", "b.png"]]),
        "a video as single frames (a.png, ...); only video files",
    ),
    "a video that is a GIF": (of_media("<video>", video="v.gif"), "v.gif is a video in the record"),
    "a video that is a picture": (of_media("<video>", video="a.png"), "a.png is a video in the"),
    "a picture that is a video": (of_media("<image>", image="v.mp4"), "v.mp4 is a picture in the"),
    "a picture that is also a video": (
        of_media("<image><video>", image="a.png", video="a.png"),
        "a.png is a video in the",
    ),
    "a picture of too many pixels": (
        {"conversation.json": json.dumps(RECORD).encode(), "pictures/1.png": wide()},
        "million pixels",
    ),
    "a large member": (
        {"conversation.json": json.dumps(RECORD).encode(), "pictures/1.png": bytes(1_000_001)},
        "pictures/1.png is larger than the 1 MB",
    ),
    "entries that nobody asks for": (
        {str(number): bytes(2_000_000) for number in range(3)},
        "Unpacked, the zip would be larger than the 4 MB",
    ),
    "many entries": ({str(number): b"" for number in range(201)}, "more than the 200 files"),
    "a long list of entries": (
        {"x" * 10_000 + str(number): b"" for number in range(7)},
        "more than the 200 files",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_zips_that_are_refused(case: str, empty: ChatSession, tmp_path: Path):
    files, words = FILES[case]
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(UserError) as told:
        unpack(tmp_path / "x.zip", empty, tmp_path, LIMITS, "en")
    assert words in str(told.value)


def test_a_zip_that_would_grow_too_much_is_not_unpacked(empty: ChatSession, tmp_path: Path):
    """However much a page takes that takes large videos: here some thousand times its size."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversation.json", json.dumps(RECORD))
        archive.writestr("pictures/1.png", bytes(6_000_000))
    with pytest.raises(UserError, match="Unpacked, the zip would be larger than the 4 MB"):
        unpack(tmp_path / "x.zip", empty, tmp_path, Limits(), "en")


def test_the_list_of_a_zip_is_not_read_before_its_length_is_known(
    empty: ChatSession, tmp_path: Path, monkeypatch
):
    """A list of 100 MB becomes gigabytes; a record for long lists is not asked at all."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("conversation.json", json.dumps(RECORD))
    whole = (tmp_path / "x.zip").read_bytes()
    body, end = whole[:-22], whole[-22:]
    locator = b"PK\x06\x07" + bytes(16)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    for changed in (body + end[:12] + b"\xff\xff\xff\x7f" + end[16:], body + locator + end):
        (tmp_path / "x.zip").write_bytes(changed)
        with pytest.raises(UserError, match="more than the 200 files"):
            unpack(tmp_path / "x.zip", empty, tmp_path, LIMITS, "en")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_told(method: int, empty: ChatSession, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("conversation.json", json.dumps(RECORD))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[50:90] = b"\xff" * 40
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match="no saved conversation"):
        unpack(tmp_path / "x.zip", empty, tmp_path, LIMITS, "en")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 cut", "no saved conversation"),
        (json.dumps([RECORD]).encode(), "names 1 pictures; open the zip"),
    ],
)
def test_other_files_that_are_refused(
    content: bytes, words: str, empty: ChatSession, tmp_path: Path
):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        unpack(tmp_path / "x.json", empty, tmp_path, LIMITS, "en")


def test_a_record_without_pictures_can_be_opened_alone(empty: ChatSession, tmp_path: Path):
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    restored = unpack(tmp_path / "x.json", empty, tmp_path, LIMITS, "en")
    assert [m["content"][0]["text"] for m in restored.messages] == ["Hi", "Ho"]
