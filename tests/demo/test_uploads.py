"""Which files are refused, in which words, and do other visitors notice?"""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import gradio as gr
import httpx
import pytest
from PIL import Image

from demo.limits import Limits
from demo.told import told
from demo.uploads import keep_picture
from vlm.errors import UserError

LIMITS = Limits(max_file_mb=1, max_megapixels=1)


def picture(size: tuple[int, int] = (40, 30), kind: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in 3.5 MB of zeros, packed to kilobytes; here its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + sum_

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3_500_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


def floats() -> bytes:
    stream = BytesIO()
    Image.new("F", (40, 30), 0.5).save(stream, "TIFF")
    return stream.getvalue()


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a decompression bomb": ("bomb.png", bomb, "million pixels that are taken"),
    "a large picture": ("wide.jpg", lambda: picture((1001, 1000), "JPEG"), "million pixels"),
    "a renamed executable": ("cat.png", lambda: b"\x7fELF\x02\x01\x01" + bytes(500), "no picture"),
    "a renamed Windows program": ("cat.jpg", lambda: b"MZ\x90\x00" + bytes(500), "no picture"),
    "an SVG with a script": ("cat.svg", lambda: SVG, "no picture"),
    "an SVG with a script, renamed": ("cat.png", lambda: SVG, "no picture"),
    "a web page": ("cat.gif", lambda: b"<html><script>1</script>", "no picture"),
    "PostScript, which PIL runs": ("cat.eps", lambda: picture(kind="EPS"), "no picture"),
    "a cut picture": ("cut.png", lambda: picture()[:900], "damaged, cut short"),
    "pixels without a range": ("float.tiff", floats, "of pixels not known here"),
    "a picture of no bytes": ("none.png", lambda: b"", "no picture"),
    "a large file": ("big.bmp", lambda: picture((999, 999), "BMP"), "larger than the 1 MB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files_are_told_in_one_sentence(case: str, tmp_path: Path):
    name, make, words = REFUSED[case]
    (tmp_path / name).write_bytes(make())
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(UserError) as told:
        keep_picture(tmp_path / name, name, kept, LIMITS, "en")
    sentence = str(told.value)
    assert words in sentence and sentence.startswith(name) and sentence.endswith(".")
    assert str(tmp_path) not in sentence and "\n" not in sentence
    assert not list(kept.iterdir())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_is_kept_is_the_picture_alone(kind: str, tmp_path: Path):
    source = tmp_path / f"cat.{kind.lower()}"
    options = {"comment": b"<script>secret</script>"} if kind in ("JPEG", "GIF") else {}
    source.write_bytes(picture(kind=kind, **options) + b"<script>secret</script>")
    path, image = keep_picture(source, "cat", tmp_path, LIMITS, "en")
    assert image.size == (40, 30) and b"secret" not in Path(path).read_bytes()
    with Image.open(path) as kept, Image.open(source) as given:
        assert kept.tobytes() == given.convert("RGB").tobytes() == image.tobytes()


def test_a_large_photo_is_kept_as_the_model_sees_it(tmp_path: Path):
    source = tmp_path / "photo.png"
    source.write_bytes(picture((1300, 900)))
    path, image = keep_picture(source, "photo", tmp_path, Limits(), "en")
    with Image.open(path) as kept:
        assert kept.format == "JPEG" and kept.tobytes() == image.tobytes()


def test_a_very_long_picture_is_kept(tmp_path: Path):
    """JPEG ends at 65,500 pixels a side."""
    Image.new("1", (70_000, 20)).save(tmp_path / "long.png")
    path, image = keep_picture(tmp_path / "long.png", "long.png", tmp_path, Limits(), "en")
    assert image.size == (70_000, 20) and Path(path).suffix == ".png"


def test_a_name_in_a_sentence_is_no_html():
    def fail(request: object) -> None:
        raise UserError("<img src='//elsewhere.example/x.png'>.png is no picture")

    with pytest.raises(gr.Error) as raised:
        told(fail)(None)
    assert raised.value.message.startswith("&lt;img src")


def upload(demo, name: str, content: bytes) -> list[str]:
    """Upload a file as the page does; return where gradio put it."""
    answer = httpx.post(f"{demo.url}gradio_api/upload", files={"files": (name, content)})
    return answer.json() if answer.status_code == 200 else []


def test_a_server_that_is_sent_bad_files_answers_others(demo):
    def post(session: str, name: str, content: bytes) -> dict:
        paths = upload(demo, name, content)
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
        return demo.call("_post", [{"text": "What?", "files": files}, "", None, 0], session)

    cases = ("a decompression bomb", "a renamed executable", "an SVG with a script, renamed")
    for case in (*cases, "a large file"):
        name, make, words = REFUSED[case]
        answer = post("bad", name, make())
        assert words in answer["error"] and str(demo.folder) not in str(answer)
        assert "Traceback" not in str(answer)
    assert upload(demo, "big.png", bytes(5_000_000)) == [], "larger than a whole conversation"
    message = post("good", "cat.png", picture())["data"][1][0]
    shown = httpx.get(f"{demo.url}gradio_api/file={message['content'][0]['file']['path']}")
    assert shown.headers["content-type"] == "image/png"


def test_an_uploaded_script_is_never_shown_as_a_page(demo):
    (path,) = upload(demo, "cat.svg", SVG)
    answer = httpx.get(f"{demo.url}gradio_api/file={path}")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
