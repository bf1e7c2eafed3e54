"""Does every kind of image file become the right RGB picture, or one clear sentence?"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.errors import UserError
from vlm.images import load_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(color, expected, tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(color, expected, strict=True))


def assert_halves(image: Image.Image, size=(40, 20)) -> None:
    assert image.mode == "RGB" and image.size == size
    assert near(image.getpixel((4, 10)), RED) and near(image.getpixel((35, 10)), BLUE)


@pytest.mark.parametrize(
    "kind, options", [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
)
def test_ordinary_files_bytes_and_pictures(kind, options, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(halves(), kind, **options))
    assert_halves(load_image(path))
    assert_halves(load_image(str(path)))
    assert_halves(load_image(path.read_bytes()))
    assert_halves(load_image(Image.open(path)))


def test_cmyk() -> None:
    data = encoded(halves().convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert load_image(data).mode == "RGB"
    # A naive conversion of inverted Adobe CMYK would give a negative.
    assert near(load_image(data).getpixel((4, 10)), RED, 40)


def test_palette() -> None:
    data = encoded(halves().quantize(4), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert_halves(load_image(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        data = encoded(image, "PNG", transparency=0)
    else:
        data = encoded(Image.new(mode, (4, 4), 0), "PNG")
    assert load_image(data).getpixel((1, 1)) == (255, 255, 255)


def test_half_transparency_is_mixed() -> None:
    data = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert near(load_image(data).getpixel((1, 1)), (127, 127, 127), 2)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16).repeat(2, 0)
    data = encoded(Image.fromarray(values), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    image = load_image(data)
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV"])
def test_other_modes(mode) -> None:
    assert load_image(halves().convert(mode)).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE, (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert near(load_image(data).getpixel((4, 4)), RED)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    data = encoded(halves(), "JPEG", quality=95, exif=exif)
    image = load_image(data)
    assert image.size == (20, 40)
    assert near(image.getpixel((10, 4)), RED) and near(image.getpixel((10, 35)), BLUE)


def test_draft_decoding_is_nearly_the_same_and_only_smaller(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth.resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=95)
    whole, draft = load_image(path), load_image(path, target_size=64)
    assert whole.size == (1600, 1200)
    assert 128 <= min(draft.size) < 600
    views = [
        np.asarray(im.resize((64, 64), Image.Resampling.BICUBIC), int) for im in (whole, draft)
    ]
    assert np.abs(views[0] - views[1]).mean() < 1.5


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**30, 2**30)])
def test_absurd_sizes_are_refused_before_decoding(size, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(*size))
    with pytest.raises(UserError) as error:
        load_image(path)
    assert "bomb.png" in str(error.value) and "pixels" in str(error.value)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="40x20 = 800 pixels, more than the limit of 799"):
        load_image(encoded(halves(), "PNG"), max_pixels=799)
    assert_halves(load_image(encoded(halves(), "PNG"), max_pixels=800))


def broken_files() -> dict[str, bytes]:
    png, jpeg = encoded(halves(400, 200), "PNG"), encoded(halves(400, 200), "JPEG")
    return {
        "zero_bytes.png": b"",
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.webp": encoded(halves(400, 200), "WEBP")[:60],
        "truncated.gif": encoded(halves(400, 200), "GIF")[:60],
        "header_only.png": png[:20],
        "text.jpg": b"<html>404 not found</html>",
        "float.tiff": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        "integers.tiff": encoded(Image.new("I", (4, 4), 1_000_000), "TIFF"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_one_sentence_with_their_name(name, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(UserError) as error:
        load_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_folders_and_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(UserError, match=r"row 7 of data\.parquet"):
        load_image(b"nothing", name="row 7 of data.parquet")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on damaged TIFF headers
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_bytes_never_escape_as_other_errors(kind) -> None:
    data = encoded(halves(64, 48), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(damaged), 6)
        damaged[places] = rng.integers(0, 256, 6)
        try:
            image = load_image(damaged.tobytes()[: rng.integers(1, len(data) + 1)])
        except UserError:
            continue
        assert image.mode == "RGB"
