"""How long until the first word about a video, against the same number of pictures?

    python tests/benchmarks/bench_first_token.py runs/quickstart/vlm/instruct

A clip of 1000 frames (640 x 360, H.264, a keyframe every 25 or 250 frames) is read from its file,
and so are as many pictures of the same size as frames are looked at, from PNG files: as the demo
does, which draws pictures anew, and as `vlm chat` does.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageFilter

from demo.limits import Limits
from demo.uploads import keep_file
from vlm.chat_session import ChatSession, Sampling
from vlm.loading import load_model

FRAMES, SIZE, TIMES = 1000, (640, 360), 7


def pictures() -> Iterator[Image.Image]:
    """Yield a textured picture that moves."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6)))
    for number in range(FRAMES):
        yield Image.fromarray(np.roll(texture, 3 * number, axis=1))


def write_clip(path: Path, gop: int) -> Path:
    """Write the clip."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def seconds_to_first_word(chat: ChatSession, files: list[Path], folder: Path | None) -> float:
    """Ask about files and wait for a piece of the reply; with a folder as the demo does."""
    chat.clear()
    start = time.perf_counter()
    for file in files:
        if folder is not None:
            chat.waiting.append(keep_file(file, file.name, chat, folder, Limits(), "en"))
        elif file.suffix == ".mp4":
            chat.add_video(file)
        else:
            chat.add_image(file)
    with closing(chat.ask("Describe the image.")) as pieces:
        next(pieces)
        return time.perf_counter() - start


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model, processor = load_model(parser.parse_args().model)
    chat = ChatSession(model, processor, Sampling(max_new_tokens=8))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = folder / "kept"
        kept.mkdir()
        cases: dict[str, list[Path]] = {
            f"video, keyframe every {gop}": [write_clip(folder / f"{gop}.mp4", gop)]
            for gop in (25, 250)
        }
        chat.add_video(folder / "25.mp4")
        num = len(chat.waiting[0][1].frames)  # pyright: ignore[reportAttributeAccessIssue]
        stills = [folder / f"{number}.png" for number in range(num)]
        for path, picture in zip(stills, pictures(), strict=False):
            picture.save(path)
        cases = {f"{num} pictures": stills, **cases}
        for where in (kept, None):
            times: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(TIMES):  # in turn, so that a busy machine slows all of them
                for case, files in cases.items():
                    times[case].append(seconds_to_first_word(chat, files, where))
            report("the demo" if where else "vlm chat", times)


def report(how: str, times: dict[str, list[float]]) -> None:
    """Print medians, and what they are of the first case's."""
    base = statistics.median(next(iter(times.values())))
    for case, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{how}, {case}: {median:.3f} s ({spread}), {median / base:.2f} of the pictures'")


if __name__ == "__main__":
    main()
