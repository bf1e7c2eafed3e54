"""Which page do the tests look at, and with which browser? One of each for all of them."""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Chromium itself must not call anybody either; --no-sandbox because CI runs as root.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-domain-reliability", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


class Voice:
    """What the tiny model says: letters of a text, over and over, as slowly as a test wants."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.say("ab ")

    def say(self, text: str, seconds: float = 0.0, end: bool = False) -> None:
        """Set the text and the time a letter takes; with `end` it is said once."""
        self.ids = self.tokenizer(text).input_ids
        if end:
            self.ids = [*self.ids, self.tokenizer.eos_token_id]
        self.seconds, self.said, self.fail = seconds, 0, False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Stand in for the model's `compute_logits`."""
        if self.fail:
            raise ZeroDivisionError("secret detail")
        time.sleep(self.seconds)
        scores = torch.zeros(*hidden.shape[:-1], len(self.tokenizer))
        scores[..., self.ids[self.said % len(self.ids)]] = 9.0
        self.said += 1
        return scores


@dataclass
class Demo:
    """A running demo."""

    url: str
    voice: Voice
    folder: Path
    connections: list[Any]  # (host, port) that the server's process connected to or looked up
    requests: list[str] = field(default_factory=list)  # URLs that the pages asked for

    def number_of(self, handler: str) -> int:
        """Return the number under which the page calls a handler."""
        events = httpx.get(f"{self.url}config").json()["dependencies"]
        return next(event["id"] for event in events if event["api_name"] == handler)

    def call(self, handler: str, data: list[Any], session: str) -> dict[str, Any]:
        """Let a handler run as the page's script does; return what the server says at the end."""
        body = {"data": data, "fn_index": self.number_of(handler), "session_hash": session}
        joined = httpx.post(f"{self.url}gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return joined.json() | {"status": joined.status_code}
        where = f"{self.url}gradio_api/queue/data"
        with httpx.stream("GET", where, params={"session_hash": session}, timeout=30) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: "):
                    message = json.loads(line.removeprefix("data: "))
                    if message["msg"] == "process_completed":
                        return message["output"] | {"status": 200}
        raise AssertionError("the answer broke off")


@pytest.fixture(scope="session")
def demo(make_model) -> Iterator[Demo]:
    """Serve a tiny model whose words the test chooses; record what the process connects to."""
    from demo.limits import Limits
    from demo.server import Address, serving

    connections: list[Any] = []

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and args[0].family != socket.AF_UNIX:
            connections.append(args[1])
        elif event == "socket.getaddrinfo":
            connections.append(args[:2])

    sys.addaudithook(audit)  # it cannot be removed; it only writes a list
    model, processor = make_model(max_position_embeddings=4096)
    voice = Voice(processor.tokenizer)
    model.compute_logits = voice.logits
    # Chromium's false camera makes pictures of 2 megapixels.
    many = {"max_requests": 10_000, "max_requests_address": 10_000}
    limits = Limits(max_file_mb=1, max_megapixels=3, max_pictures=4, max_waiting=2, **many)
    with serving("tiny", model, processor, limits, Address()) as url:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        yield Demo(url, voice, folder, connections)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, demo) -> Iterator[Any]:
    """(**options of the browser's context) -> the demo's page, opened and ready."""
    contexts = []

    def open_one(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(45_000)  # a busy machine fails no test
        page.on("request", lambda request: demo.requests.append(request.url))
        page.goto(demo.url)
        page.wait_for_selector("#box textarea")
        return page

    yield open_one
    for context in contexts:
        context.close()
