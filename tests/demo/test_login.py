"""What can be had without the password, and how often may a visitor ask?"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

import gradio as gr
from gradio.routes import App
from starlette.routing import Route

from demo.gate import API, GET, GET_BELOW, OPEN, OPEN_BELOW, POST
from demo.limits import Limits
from demo.server import Address, serving

LIMITS = Limits(max_requests=4, max_requests_address=7)
PASSWORD = {"username": "ann", "password": "secret"}


@pytest.fixture(scope="module")
def locked(make_model) -> Iterator[str]:
    """The address of a page that asks for a password."""
    with serving("tiny", *make_model(), LIMITS, Address(auth=("ann", "secret"))) as url:
        yield url


def routes() -> list[tuple[str, str]]:
    """(method, path) of everything that gradio answers, and that the gate lets through."""
    own = App.create_app(gr.Blocks()).routes
    included: Any = [route for route in own if not isinstance(route, Route)]
    (router,) = (one.original_router for one in included)
    found = {
        (method, prefix + re.sub(r"\{.*?\}", "x", route.path))
        for prefix, routes in (("", own), (API, router.routes))
        for route in routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    through = {("GET", path) for path in {*GET, *(below + "x" for below in GET_BELOW)}}
    through |= {("POST", path + end) for path in POST for end in ("", "/")}
    return sorted(found | through)


def test_without_the_password_only_the_page_that_asks_for_it_is_there(locked: str):
    assert len(routes()) > 90, "gradio's routes were not found"
    answers: dict[str, set[int]] = {"open": set(), "closed": set()}
    with httpx.Client(base_url=locked) as visitor:
        for method, path in routes():
            if path.rstrip("/") == "/login" and method == "POST":
                continue
            with visitor.stream(method, path, json={} if method == "POST" else None) as answer:
                is_open = path in OPEN or path.startswith(OPEN_BELOW)
                answers["open" if is_open else "closed"].add(answer.status_code)
                ours = path in GET or path.startswith(GET_BELOW) or path.rstrip("/") in POST
                closed = 401 if ours and method in ("GET", "POST", "HEAD") else 404
                assert is_open or answer.status_code in (closed, 404), (method, path)
        assert answers["closed"] == {401, 404} and 401 not in answers["open"]
        assert '"auth_required":true' in visitor.get("/").text
        for path in ("cancel", "reset", "queue/join", "upload", "run/predict"):
            assert visitor.post(f"{API}/{path}", json={}).status_code == 401, path
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        (folder / "a.txt").write_text("private")
        answer = visitor.get(f"{API}/file={folder}/a.txt", headers={"accept-language": "zh"})
        assert answer.status_code == 401 and "请先登录" in answer.json()["detail"]


def logged_in(url: str) -> httpx.Client:
    """Return a browser that has opened the page and given the password."""
    visitor: Any = httpx.Client(base_url=url)
    visitor.get("/")
    assert visitor.post("/login", data=PASSWORD).is_success
    return visitor


def test_visitors_of_one_address_are_counted_apart_and_together(locked: str):
    """As all visitors are who come through a proxy; guesses at the password count by address."""
    ann, bob = logged_in(locked), logged_in(locked)
    assert ann.get("/config").is_success
    made_up = httpx.Client(base_url=locked, cookies={**ann.cookies, "vlm-visitor": "x" * 22})

    def send(visitor: httpx.Client) -> tuple[int, str]:
        answer = visitor.post(f"{API}/upload", files={"files": ("a.png", b"x")})
        return answer.status_code, answer.text if answer.status_code == 429 else ""

    assert [send(ann)[0] for _ in range(5)] == [200] * 4 + [429]
    assert "More than 4 requests" in send(ann)[1]
    assert [send(bob)[0] for _ in range(3)] == [200] * 3
    assert "More than 7 requests" in send(bob)[1] and send(made_up)[0] == 429
    wrong = {**PASSWORD, "password": "guess"}
    with httpx.Client(base_url=locked) as guesser:
        assert [guesser.post("/login", data=wrong).status_code for _ in range(3)] == [400, 400, 429]


def test_direct_calls_are_counted_apart_and_are_more(make_model):
    """The page makes them too, at each opening and to stop a reply."""
    with (
        serving("tiny", *make_model(), LIMITS, Address()) as url,
        httpx.Client(base_url=url) as ann,
    ):
        events = ann.get("/config").json()["dependencies"]
        (stop,) = (event["id"] for event in events if event["api_name"] == "stop")
        body = {"data": [None], "fn_index": stop, "session_hash": "ann"}
        sent = [ann.post(f"{API}/run/predict", json=body) for _ in range(17)]
    assert [answer.status_code for answer in sent] == [200] * 16 + [429]
    assert "More than 16 requests" in sent[-1].json()["detail"]
