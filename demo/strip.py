"""Which frames of a video did the model look at? A strip of them with their times."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm.video import SampledVideo

HEIGHT = 90  # pixels of a frame
LETTERS = 14  # pixels of the times below
GAP = 4
MOST_WIDE = 8  # frames in a row


def draw_strip(video: SampledVideo) -> Image.Image:
    """Return the frames side by side, rows of `MOST_WIDE`, with their times in seconds below."""
    first = video.frames[0]
    width = max(36, round(HEIGHT * first.width / first.height))
    columns = min(MOST_WIDE, len(video.frames))
    rows = -(-len(video.frames) // columns)
    step = HEIGHT + LETTERS + 2 * GAP
    size = (columns * (width + GAP) - GAP, rows * step - GAP)
    strip = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(LETTERS - 2)
    for number, (frame, time) in enumerate(zip(video.frames, video.times, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * (width + GAP), row * step
        strip.paste(frame.resize((width, HEIGHT)), (left, top))
        words = clock(time)
        middle = left + (width - draw.textlength(words, font)) / 2
        draw.text((middle, top + HEIGHT + 2), words, "#334155", font)
    return strip


def clock(seconds: float) -> str:
    """Return a time as 0:07.5, or 1:02:07 from an hour on.

    >>> clock(7.54), clock(3727)
    ('0:07.5', '1:02:07')
    """
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    if minutes < 60:
        return f"{minutes}:{rest // 10:02}.{rest % 10}"
    return f"{minutes // 60}:{minutes % 60:02}:{rest // 10:02}"


def strip_file(video: SampledVideo, path: Path) -> Path:
    """Return the file of the strip of a video that is kept at `path`, drawn if it is not there."""
    file = path.with_name(f"strip-{path.stem}-{len(video.frames)}.png")
    if not file.exists():
        draw_strip(video).save(file)
    return file
