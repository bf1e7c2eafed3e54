"""How does the page look? Take docs/demo*.png, sees.png and compare.png anew.

    python tests/demo/screenshots.py runs/quickstart/vlm/instruct
    python tests/demo/screenshots.py runs/scenes-video/watch --only demo-video
    python tests/demo/screenshots.py runs/quickstart/vlm/instruct --compare MODEL2

The clip is the first of the benchmark's in which two objects appear, whatever the model says of it;
the page names the model by its folder below runs/.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from demo.limits import Limits
from demo.sample_questions import SAMPLES
from demo.server import Address, serving
from vlm.loading import load_model

CLIP = "runs/quickstart/moving/test/appear_00008.mp4"
WATCH = (
    "How many objects appear in the course of the video? Select from the following choices.\n"
    "(A) 0\n(B) 1\n(C) 2\n(D) 3"
)
WIDE = {"viewport": {"width": 1100, "height": 720}}
WIDER = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 760}, "is_mobile": True, "has_touch": True}


def ask(page: Page, question: str, *files: Path) -> None:
    """Upload files, ask, and wait for the whole answer."""
    if files:
        page.set_input_files("#box [data-testid=file-upload]", files)
        page.locator("#box .thumbnail-item").nth(len(files) - 1).wait_for()
        page.wait_for_function("() => !document.querySelector('#box .loader')")
    page.fill("#box textarea", question)
    page.press("#box textarea", "Enter")
    page.wait_for_selector("#chat [aria-label=Retry]")
    page.wait_for_selector("#box .submit-button")


def one_picture(page: Page, clip: Path) -> None:
    """A sample question and its answer."""
    page.locator("#chat .example").nth(1).click()
    page.wait_for_selector("#chat [aria-label=Retry]")
    page.wait_for_selector("#box .submit-button")


def sees(page: Page, clip: Path) -> None:
    """A sample question of counting, and where the model looked at the answer's second word."""
    page.click("#see")
    page.locator("#chat .example").nth(0).click()
    page.wait_for_selector("#heat img")
    page.wait_for_selector("#box .submit-button")
    page.locator("#words input").nth(2).check()
    page.wait_for_selector("#heat img[alt*='for “y']")


def both(page: Page, clip: Path) -> None:
    """A sample question about places, answered by two models."""
    page.locator("#chat .example").nth(2).click()
    page.wait_for_selector("#chat [aria-label=Retry]")
    page.wait_for_selector("#box .submit-button")


def empty(page: Page, clip: Path) -> None:
    """What a visitor finds."""
    page.wait_for_selector("#chat .example")


def video(page: Page, clip: Path) -> None:
    """A question about a video."""
    ask(page, WATCH, clip)
    page.wait_for_function("document.querySelector('#chat video')?.readyState >= 2")


def error(page: Page, clip: Path) -> None:
    """A file that is refused."""
    program = clip.with_name("holiday.png")
    program.write_bytes(b"MZ" + bytes(100))
    page.set_input_files("#box [data-testid=file-upload]", [SAMPLES[0].path, program])
    page.locator("#box .thumbnail-item").nth(1).wait_for()
    page.fill("#box textarea", "What is the same in both?")
    page.press("#box textarea", "Enter")
    page.wait_for_selector("[data-testid=toast-body]")


SHOTS: dict[str, tuple[dict[str, Any], Callable[[Page, Path], None]]] = {
    "demo": (WIDE, one_picture),
    "demo-video": (WIDE, video),
    "demo-error": (WIDE, error),
    "demo-phone": (PHONE, one_picture),
    "demo-dark": (WIDE | {"color_scheme": "dark", "locale": "zh-CN"}, empty),
    "sees": (WIDER, sees),
    "compare": (WIDER, both),
}


def main() -> None:
    """Serve the model and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--compare", metavar="MODEL2", help="take compare.png alone")
    parser.add_argument("--clip", type=Path, default=Path(CLIP))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--only", choices=SHOTS, nargs="*", help="default: all of one model")
    args = parser.parse_args()
    names = [args.model, *([args.compare] if args.compare else [])]
    first, *other = [(name.removeprefix("runs/"), *load_model(name)) for name in names]
    shots = ["compare"] if args.compare else args.only or [n for n in SHOTS if n != "compare"]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(*first, Limits(), Address(), *other) as url,
        sync_playwright() as playwright,
    ):
        clip = Path(shutil.copy(args.clip, folder))
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        for name in shots:
            options, act = SHOTS[name]
            page = browser.new_context(**options).new_page()
            page.goto(url)
            page.wait_for_selector("#box textarea")
            page.wait_for_timeout(800)
            act(page, clip)
            page.mouse.move(5, 300)
            page.wait_for_timeout(1200)
            file = args.out / f"{name}.png"
            page.screenshot(path=file)
            Image.open(file).convert("RGB").save(file, optimize=True)
            print(f"{file}: {file.stat().st_size // 1000} KB", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
