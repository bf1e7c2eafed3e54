"""Do pictures and films come into the question: dragged, pasted, from a camera, on a full disk?"""

import base64
import errno
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from demo.limits import Limits
from demo.talk import Served, Talks, begin
from demo.uploads import keep_file

# What a browser tells the page when a file is let go over it, or pasted.
LET_GO = """([place, kind, picture]) => {
  const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], "cat.png", { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent(kind, { clipboardData: files, bubbles: true, cancelable: true })
    : new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true });
  return !document.querySelector(place).dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def png() -> bytes:
    stream = BytesIO()
    Image.new("RGB", (64, 48), "teal").save(stream, "PNG")
    return stream.getvalue()


def ask(page, text: str) -> None:
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def test_pictures_are_dragged_and_pasted_anywhere(demo, open_page, png):
    """Outside of the box a browser would open the picture in place of the page."""
    demo.voice.say("Two.", end=True)
    page = open_page()
    page.wait_for_selector("#chat .example")
    picture = base64.b64encode(png).decode()
    places = [("#chat", "drop"), ("body", "paste"), ("#box textarea", "drop")]
    for number, (place, kind) in enumerate(places, start=1):
        assert kind == "paste" or page.evaluate(LET_GO, [place, "dragover", picture])
        assert page.evaluate(LET_GO, [place, kind, picture]), f"the browser handles {kind} itself"
        page.locator("#box .thumbnail-item").nth(number - 1).wait_for()
    page.wait_for_function("() => !document.querySelector('#box .loader')")
    assert page.locator("#box .thumbnail-item").count() == 3
    ask(page, "How many?")
    page.get_by_text("Two.").wait_for()
    assert page.locator("#chat .message img").count() == 3


def test_the_camera_takes_a_picture_and_a_film(demo, open_page):
    demo.voice.say("A green disc.", end=True)
    page = open_page(permissions=["camera"])  # not the microphone
    for taken, kind in enumerate(("photo", "film")):
        page.click("#camera-button")
        page.locator(f"#{kind} button:visible").first.click()
        page.wait_for_function(f"document.querySelector('#{kind} video')?.readyState >= 2")
        button = page.locator(f"#{kind} .capture-button, #{kind} [aria-label='capture photo']")
        button.first.click()
        if kind == "film":  # of some frames, also on a busy machine
            time = "document.querySelector('#film video').currentTime"
            page.wait_for_function(f"{time} > {page.evaluate(time) + 1.5}")
            button.first.click()
        page.locator("#box .thumbnail-item").nth(taken).wait_for()
        page.wait_for_selector("#camera", state="hidden")
    ask(page, "What is this?")
    page.get_by_text("A green disc.").wait_for()
    assert page.locator("#chat .message img").count() == 2, "the picture, the film's frames"
    assert page.locator("#chat video").count() == 1


def full(*args: object, **named: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_while_a_file_comes(demo, png, monkeypatch):
    def upload(language: str) -> httpx.Response:
        files, headers = {"files": ("a.png", png)}, {"accept-language": language}
        return httpx.post(f"{demo.url}gradio_api/upload", files=files, headers=headers)

    with monkeypatch.context() as changed:
        changed.setattr("gradio.route_utils.GradioMultiPartParser.parse", full)
        answer = upload("en")
        assert (answer.status_code, answer.json()["detail"][:16]) == (507, "There is no room")
    with monkeypatch.context() as changed:
        changed.setattr("demo.gate._used_bytes", lambda folder: 2_000_000_000)
        assert "目前没有空间" in upload("zh").json()["detail"]
    assert upload("en").status_code == 200


def test_a_full_disk_leaves_no_half_of_a_file(make_model, make_clip, png, tmp_path, monkeypatch):
    served = Served("x", *make_model(), Limits(), tmp_path, Talks(1))
    talk = begin(served, "one")
    assert talk
    (tmp_path / "a.png").write_bytes(png)
    make_clip(tmp_path / "a.mp4", 3)

    def half(self: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        full()

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr("shutil.copyfile", lambda source, path: half(None, path))
    for name in ("a.png", "a.mp4"):
        with pytest.raises(OSError, match="No space"):
            keep_file(tmp_path / name, name, talk.chat, talk.folder, Limits(), "en")
        assert not list(talk.folder.iterdir())


def test_files_go_when_the_conversation_no_longer_has_them(make_model, make_clip, png, tmp_path):
    served = Served("x", *make_model(), Limits(), tmp_path, Talks(1))
    talk = begin(served, "one")
    assert talk
    (tmp_path / "a.png").write_bytes(png)
    make_clip(tmp_path / "a.mp4", 3)
    for name in ("a.png", "a.mp4", "a.png"):
        kept = keep_file(tmp_path / name, name, talk.chat, talk.folder, Limits(), "en")
        talk.chat.waiting.append(kept)
    (clip,) = (Path(path) for path, _ in talk.chat.waiting if path.endswith("mp4"))
    strip = talk.folder / f"strip-{clip.stem}-3.png"
    zipped = talk.folder / "conversation-12.zip"
    for path in (strip, zipped):
        path.touch()
    talk.chat.waiting.pop()
    talk.tidy()
    kept = {Path(path).name for path, _ in talk.chat.waiting} | {strip.name}
    assert {path.name for path in talk.folder.iterdir()} == kept
