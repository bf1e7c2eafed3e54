"""Which requests are refused, by the gate alone and by the running server?"""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from demo.gate import check_files, check_route
from demo.limits import Limits
from demo.server import Address, serving
from demo.visitors import Rates

HOST = "127.0.0.1:7860"


@pytest.mark.parametrize(
    ("method", "path", "changes", "status"),
    [
        ("GET", "/", {}, None),
        ("HEAD", "/", {}, None),
        ("GET", "/assets/index.js", {}, None),
        ("GET", "/gradio_api/file=/tmp/x/a.png", {}, None),
        ("POST", "/gradio_api/queue/join", {"origin": f"http://{HOST}"}, None),
        ("POST", "/gradio_api/queue/join", {}, None),
        ("POST", "/gradio_api/queue/join", {"origin": "http://evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "null"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://["}, 403),
        ("POST", "/login", {"sec-fetch-site": "cross-site"}, 403),
        ("GET", "/", {"host": "evil.example:7860"}, 403),
        ("GET", "/gradio_api/file=http://127.0.0.1:22/", {}, 404),
        ("GET", "/gradio_api/file=/tmp/x/../../etc/passwd", {}, 404),
        ("GET", "/static/../../etc/passwd", {}, 404),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:22/", {}, 404),
        ("GET", "/gradio_api/info", {}, 404),
        ("GET", "/monitoring", {}, 404),
        ("POST", "/gradio_api/component_server", {}, 404),
        ("POST", "/gradio_api/call/post", {}, 404),
        ("POST", "/", {}, 404),
        ("PUT", "/gradio_api/upload", {}, 404),
    ],
)
def test_routes(method: str, path: str, changes: dict[str, str], status: int | None):
    refusal = check_route(method, path, {"host": HOST} | changes, local=True)
    assert (refusal.status if refusal else None) == status


def test_a_page_open_to_the_network_goes_by_any_name():
    assert check_route("GET", "/", {"host": "demo.example"}, local=False) is None


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ({"path": "{folder}/a.png"}, True),
        ({"path": "{folder}/a.png", "url": f"http://{HOST}/gradio_api/file=a.png"}, True),
        ({"path": "/etc/passwd"}, False),
        ({"path": "{folder}/../x.png"}, False),
        ({"path": "{folder}/link"}, False),
        ({"path": "http://127.0.0.1:22/a.png"}, False),
        ({"path": ["a"]}, False),
        ({"path": "{folder}/a.png", "url": "http://127.0.0.1:22/a.png"}, False),
        ({"path": "{folder}/a.png", "url": "//elsewhere.example/a.png"}, False),
        ({"url": "https://elsewhere.example/a.png"}, False),
        ({"url": "http://["}, False),
    ],
)
def test_files_that_calls_may_name(tmp_path: Path, named: dict, taken: bool):
    (tmp_path / "link").symlink_to("/etc/passwd")
    text = json.dumps({"data": [{"text": "What?", "files": [named]}, None]})
    body = json.loads(text.replace("{folder}", str(tmp_path)))
    assert (check_files(body, tmp_path, HOST) is None) == taken


def test_rates_forget_after_a_minute():
    rates = Rates(2)
    asked = [rates.too_often("a", now) for now in (0, 1, 2, 3, 61, 62)]
    assert asked == [False, False, True, True, False, False]
    assert not rates.too_often("b", 2)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1:9/a.png", "{folder}/../../etc/passwd"]
)
def test_a_crafted_call_gets_no_file_and_no_address(demo, path: str):
    path = path.replace("{folder}", str(demo.folder))
    before = len(demo.connections)
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
        data = [{"text": "What?", "files": [{"path": path, **meta}]}, "", None, 0]
        answer = demo.call("_post", data, "crafted")
        assert answer["status"] == 400 and "Only files that were uploaded" in answer["detail"]
    called = [target for target in demo.connections[before:] if target[1] == 9]
    assert not called, "the server asked the address"


@pytest.mark.parametrize("route", ["run/predict", "run/predict/", "queue/join"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"data": [{"path": "/etc/passwd"}], "fn_index": 0}', 400),
        (b'{"data": [NaN], "fn_index": 0}', 400),
        (b"[" * 100_000, 400),
        (b" " * 1_000_001, 413),
    ],
)
def test_every_spelling_of_a_route_has_its_body_checked(demo, route: str, body: bytes, status: int):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{demo.url}gradio_api/{route}", content=body, headers=headers)
    assert answer.status_code == status, answer.text[:200]


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=README.md",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "gradio_api/file=http://127.0.0.1:9/x.png",
        "gradio_api/file=file:///etc/passwd",
        "static/..%2f..%2f..%2f..%2fetc/passwd",
        "assets/%2e%2e/%2e%2e/%2e%2e/version.txt",
        "gradio_api/proxy=http://127.0.0.1:9/",
        "gradio_api/info",
        "monitoring/summary",
        "gradio_api/openapi.json",
    ],
)
def test_no_file_of_the_machine_is_given_out(demo, path: str):
    answer = httpx.get(demo.url + path)
    assert answer.status_code in (403, 404), answer.text[:200]
    assert "root:" not in answer.text


def test_a_foreign_page_cannot_post(demo):
    evil = {"origin": "http://evil.example"}
    for language, words in (("en", "does not come from"), ("zh-CN", "不是")):
        headers = evil | {"accept-language": language}
        answer = httpx.post(f"{demo.url}gradio_api/queue/join", json={}, headers=headers)
        assert answer.status_code == 403 and words in answer.json()["detail"]
    answer = httpx.get(demo.url, headers={"host": "evil.example"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "headers", [{"content-length": str(10**9)}, {"transfer-encoding": "chunked"}]
)
def test_an_upload_tells_its_size_and_is_small(demo, headers: dict[str, str]):
    connection = http.client.HTTPConnection(urlsplit(demo.url).netloc, timeout=10)
    connection.putrequest("POST", "/gradio_api/upload")
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and b"larger than" in answer.read()


def test_the_queue_is_bounded_and_says_so(demo):
    demo.voice.say("ab ", seconds=0.03)
    names = [f"visitor {number}" for number in range(4)]
    for name in names:
        assert demo.call("_post", [{"text": "Hi", "files": []}, "", None, 0], name)["status"] == 200
    with ThreadPoolExecutor(4) as pool:
        settings = [None, 0, 1, 20, 1]
        answers = list(pool.map(lambda name: demo.call("_answer", settings, name), names))
    # One is answered, max_waiting = 2 wait, and the fourth is told.
    assert sorted(answer["status"] for answer in answers) == [200, 200, 200, 429]
    (told,) = (answer["detail"] for answer in answers if answer["status"] == 429)
    assert told == "Too many people are asking right now; try again in a minute."


def test_no_handler_is_called_past_the_queue(demo):
    """Only the cheap ones that the page calls directly, such as "Stop", can be."""
    events = httpx.get(f"{demo.url}config").json()["dependencies"]
    assert {"_post", "_answer", "_look", "write", "read"} <= {
        event["api_name"] for event in events if event["queue"]
    }
    for event in events:
        body = {"data": [None] * len(event["inputs"]), "fn_index": event["id"], "session_hash": "p"}
        answer = httpx.post(f"{demo.url}gradio_api/run/predict", json=body)
        assert (answer.status_code == 404) == bool(event["queue"]), (event["api_name"], answer.text)


def test_invented_sessions_make_room_for_pages(demo, make_model):
    """A page holds a connection while it is open; its conversation makes room for none of them."""
    question = [{"text": "Hi", "files": []}, "", None, 0]
    with serving("tiny", *make_model(), Limits(max_visitors=2), Address()) as url:
        server = replace(demo, url=url)

        def post(session: str) -> int | str:
            output = server.call("_post", question, session)
            return output["status"] if "data" in output else output["error"]

        assert [post(f"made up {number}") for number in range(4)] == [200] * 4
        with ExitStack() as pages:
            held = []  # an iterator that is dropped closes its connection
            for name in ("ann", "bob"):
                where = f"{url}gradio_api/heartbeat/{name}"
                held.append(pages.enter_context(httpx.stream("GET", where)).iter_lines())
                assert "ALIVE" in next(held[-1])
                assert post(name) == 200
            assert "Too many people" in str(post("made up 5"))
            assert "Wait for the reply" in str(post("ann")), "the conversation is still there"
