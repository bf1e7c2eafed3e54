"""Does `vlm demo` take its options, and leave nothing behind?"""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest

from demo import cli as demo_cli
from demo.handlers import Handlers
from demo.limits import Limits
from demo.talk import IDLE_SECONDS, Served, Talks, begin, sweep_uploads
from vlm.cli import main


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--auth", "ann"], "a user and a password"),
        (["--auth", ":x"], "a user and a password"),
        (["--max-waiting", "0"], "--max-waiting must be at least 1"),
        (["--port", "99999"], "--port 99999 cannot be used"),
    ],
)
def test_wrong_options_are_told(model_folder: Path, capsys, words: list[str], sentence: str):
    assert main(["demo", str(model_folder), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_taken_port_is_told(model_folder: Path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["demo", str(model_folder), "--port", str(other.getsockname()[1])]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_no_tunnel_is_told_in_one_sentence(model_folder: Path, monkeypatch, capsys):
    """As offline; gradio itself would print several lines and serve the page without."""

    def offline(**options: object) -> None:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr("gradio.networking.setup_tunnel", offline)
    assert main(["demo", str(model_folder), "--share"]) == 2
    told = capsys.readouterr()
    assert "--share: no tunnel could be opened" in told.err and told.out == ""


def test_the_command_serves_until_it_is_stopped(model_folder: Path, monkeypatch, capsys):
    asked = []

    def wait() -> None:
        asked.append(httpx.get(capsys.readouterr().out.split()[1]).text)

    monkeypatch.setattr(demo_cli, "_wait", wait)
    assert main(["demo", str(model_folder)]) == 0
    assert f"/{model_folder.name}" in asked[0] and str(model_folder) not in asked[0]


@pytest.fixture
def served(make_model, tmp_path: Path) -> Served:
    return Served("tiny", *make_model(), Limits(), tmp_path, Talks(2))


def test_conversations_are_so_many_and_those_left_make_room(served: Served):
    with served.talks.page_open("b"), served.talks.page_open("c"):
        with served.talks.page_open("a"):
            first, second = begin(served, "a"), begin(served, "b")
            assert first and second and begin(served, "c") is None
            assert len(list(served.folder.iterdir())) == 2
            served.talks.leave("a")
        assert first.stopped and first.folder.exists(), "the page may come back"
        with served.talks.page_open("a"):
            assert begin(served, "c") is None, "it did"
        third = begin(served, "c")
        assert third and first.is_gone and not second.is_gone
        served.talks.forget(second)
        assert second.is_gone and begin(served, "d")


def test_sessions_that_a_script_makes_up_lock_nobody_out(served: Served):
    made_up = [begin(served, f"x{number}") for number in range(5)]
    assert sum(talk is not None and not talk.is_gone for talk in made_up) == 2
    with served.talks.page_open("page"):
        talk = begin(served, "page")
        more = [begin(served, f"y{number}") for number in range(5)]
        assert talk and not talk.is_gone and all(more)


def test_whoever_made_room_is_told_so(served: Served):
    request: Any = SimpleNamespace(headers={"accept-language": "en"}, session_hash="a")
    talk, handlers = begin(served, "a"), Handlers(served)
    assert talk
    talk.put("What?")
    assert all(begin(served, name) for name in "bc") and talk.is_gone
    asked = {"text": "And?", "files": []}
    for call in (
        lambda: list(handlers.answer(talk, 0, 1, 2, 1, request)),
        lambda: handlers.post(asked, "", talk, 1, request),
        lambda: handlers.retry(SimpleNamespace(index=1), talk, request),
    ):
        with pytest.raises(gr.Error, match="no longer there"):
            call()
    assert len(list(served.folder.iterdir())) == 2, "no conversation was begun in its place"
    box = handlers.take_back(talk, request)[1]
    assert box["value"]["text"] == "What?"


def test_an_open_page_makes_room_after_minutes_but_not_while_it_is_answered(served: Served):
    with served.talks.page_open("a"), served.talks.page_open("b"):
        first, second = begin(served, "a"), begin(served, "b")
        assert first and second
        first.used, second.used = (one.used - 2 * IDLE_SECONDS for one in (first, second))
        first.answering = True
        assert begin(served, "c") and second.is_gone and not first.is_gone
        first.answering = False
        with served.talks.page_open("c"):
            first.put("What?")
            assert begin(served, "d") is None, "both were used just now"


def test_old_uploads_go_and_pictures_of_conversations_stay(served: Served):
    talk = begin(served, "a")
    assert talk
    old, new = served.folder / "old", served.folder / "new"
    for folder in (old, new):
        folder.mkdir()
    for folder in (old, talk.folder):
        os.utime(folder, (0, 0))
    sweep_uploads(served.folder)
    assert [old.exists(), new.exists(), talk.folder.exists()] == [False, True, True]
