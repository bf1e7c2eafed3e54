"""Are videos taken, shown with the frames that were looked at, and refused in a sentence?"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.limits import Limits
from demo.strip import HEIGHT, clock, draw_strip
from demo.talk import Talk, question_at, shown
from demo.uploads import keep_file
from vlm.chat_session import ChatSession, Sampling
from vlm.errors import UserError
from vlm.video import SampledVideo

pytest.importorskip("av", reason="av is not installed (make extras EXTRAS=demo)")


@pytest.fixture
def chat(make_model) -> ChatSession:
    return ChatSession(*make_model(), Sampling(max_new_tokens=2))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00.0"), (7.54, "0:07.5"), (59.96, "1:00.0"), (3599.9, "59:59.9"), (3727, "1:02:07")],
)
def test_times_are_told_as_on_a_clock(seconds: float, words: str):
    assert clock(seconds) == words


def test_a_strip_shows_every_frame_in_order():
    shades = range(0, 200, 20)
    frames = tuple(Image.new("RGB", (64, 48), (shade, 0, 0)) for shade in shades)
    strip = np.asarray(draw_strip(SampledVideo(frames, tuple(range(10)), 10.0, 250)))
    top, below = strip[HEIGHT // 2, 60::124, 0], strip[-HEIGHT // 2 - 20, 60::124, 0]
    assert [*top, *below[:2]] == list(shades), "eight in a row, then the rest"
    assert strip[HEIGHT:, :, 0].min() < 100, "no times"


def test_the_page_shows_a_video_and_its_strip(chat: ChatSession, make_clip, tmp_path: Path):
    make_clip(tmp_path / "clip.mp4", 20)
    talk = Talk(chat, tmp_path)
    chat.waiting.append(keep_file(tmp_path / "clip.mp4", "a.mp4", chat, tmp_path, Limits(), "en"))
    list(chat.ask("What happens?"))
    talk.question = "Sure?"
    messages = shown(talk, "en")
    video, strip = (file["path"] for file in messages[0]["content"])
    assert video.endswith(".mp4") and Path(strip).is_file() and "strip-" in strip
    assert [message["content"] for message in messages[1::2]] == ["What happens?", "Sure?"]
    assert [question_at(messages, number) for number in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("none.mp4", lambda clip: b"", "is empty"),
        ("cut.mp4", lambda clip: clip[: len(clip) // 2], "cannot be read"),
        ("program.webm", lambda clip: b"MZ" + bytes(999), "cannot be read"),
        ("list.mp4", lambda clip: b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "cannot be read"),
        ("long.mp4", lambda clip: clip, "more than the limit of 1 s"),
        ("clip.png", lambda clip: clip, "is no picture"),
    ],
)
def test_refused_videos_are_told_in_one_sentence(
    name: str, make, words: str, chat: ChatSession, make_clip, tmp_path: Path
):
    clip = make_clip(tmp_path / "clip.mp4", 60, rate=25).read_bytes()
    (tmp_path / name).write_bytes(make(clip))
    folder = tmp_path / "kept"
    folder.mkdir()
    limits = Limits(max_video_seconds=1 if name == "long.mp4" else 600)
    with pytest.raises(UserError) as told:
        keep_file(tmp_path / name, name, chat, folder, limits, "en")
    sentence = str(told.value)
    assert words in sentence and name in sentence and str(tmp_path) not in sentence
    assert not list(folder.iterdir()) and not chat.waiting


def test_a_visitor_asks_about_a_video(demo, open_page, make_clip, tmp_path: Path):
    demo.voice.say("The bars count.", end=True)
    page = open_page()
    page.set_input_files(
        "#box [data-testid=file-upload]", make_clip(tmp_path / "clip.webm", 30, codec="libvpx")
    )
    page.locator("#box .thumbnail-item").wait_for()
    page.wait_for_function("() => !document.querySelector('#box .loader')")
    page.fill("#box textarea", "What happens?")
    page.press("#box textarea", "Enter")
    page.get_by_text("The bars count.").wait_for()
    strip = page.locator("#chat .message img")
    assert strip.get_attribute("alt") == "The frames that the model looks at, with their times"
    page.wait_for_function("document.querySelector('#chat video')?.readyState >= 2")
    assert page.evaluate("document.querySelector('#chat video').videoWidth") == 64
    demo.voice.say("Again.", end=True)
    page.locator("#chat [aria-label=Retry]").click()
    page.get_by_text("Again.").wait_for()
    assert page.locator("#chat video").count() == 1
