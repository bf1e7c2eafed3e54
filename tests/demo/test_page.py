"""Does the page do what a visitor asks of it, in a real browser?"""

import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from demo.as_written import JOINER

BOT, USER = "#chat [data-testid=bot]", "#chat [data-testid=user]"


@pytest.fixture
def pictures(make_image, tmp_path: Path) -> list[str]:
    paths = [tmp_path / "cat.png", tmp_path / "dog.jpg"]
    for seed, path in enumerate(paths):
        make_image(64, 48, seed).save(path)
    return [str(path) for path in paths]


def attach(page, paths: list[str]) -> None:
    """Upload files into the box and wait for their thumbnails, which come when they are there."""
    page.set_input_files("#box [data-testid=file-upload]", paths)
    page.locator("#box .thumbnail-item").nth(len(paths) - 1).wait_for()
    page.wait_for_function("() => !document.querySelector('#box .loader')")


def ask(page, text: str) -> None:
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def settled(page) -> None:
    """Wait until the box can send again."""
    page.wait_for_selector("#box .submit-button")


def test_pictures_and_words_go_to_the_model_and_its_words_come_back(demo, open_page, pictures):
    demo.voice.say("It is a cat.", end=True)
    page = open_page()
    attach(page, pictures)
    ask(page, "What is it?")
    page.get_by_text("It is a cat.").wait_for()
    settled(page)
    assert page.locator("#chat .message img").count() == 2
    alts = page.locator("#chat .message img").evaluate_all("all => all.map(x => x.alt)")
    assert alts == ["Picture 1", "Picture 2"]
    assert page.input_value("#box textarea") == ""
    # Retry, then edit: the answer and the question are replaced, the pictures stay.
    demo.voice.say("No, a dog.", end=True)
    page.locator("#chat [aria-label=Retry]").click()
    page.get_by_text("No, a dog.").wait_for()
    assert page.get_by_text("It is a cat.").count() == 0
    settled(page)
    demo.voice.say("Two of them.", end=True)
    page.locator("#chat [aria-label=Edit]").first.click()
    page.locator("#chat textarea").fill("How many?")
    page.locator("#chat [aria-label=Submit]").click()
    page.get_by_text("Two of them.").wait_for()
    assert page.get_by_text("What is it?").count() == 0
    assert page.locator("#chat .message img").count() == 2
    settled(page)
    page.locator("#chat [aria-label=Edit]").first.click()
    page.locator("#chat textarea").fill("")
    page.locator("#chat [aria-label=Submit]").click()
    page.get_by_text("Write a question first.").wait_for()
    settled(page)
    page.get_by_text("How many?").wait_for()  # it comes back after the sentence
    assert page.get_by_text("How many?").count() == page.get_by_text("Two of them.").count() == 1
    page.click("#new-chat")
    page.get_by_text("Show a picture or a video, ask about it").wait_for()
    assert page.locator("#chat .message").count() == 0


def test_no_request_leaves_the_machine(demo, open_page, pictures):
    """Neither the browser's nor the server's, fonts, scripts and version checks included."""
    demo.voice.say("Here.", end=True)
    page = open_page()
    attach(page, pictures[:1])
    ask(page, "Who is there?")
    page.get_by_text("Here.").wait_for()
    asked = {urlsplit(url).netloc for url in demo.requests if urlsplit(url).scheme != "data"}
    assert {host.partition(":")[0] for host in asked} <= {"127.0.0.1", ""}
    assert len(demo.requests) > 20 and demo.connections, "nothing was recorded"
    assert {host for host, *_ in demo.connections} <= {"127.0.0.1", "localhost", "::1", None}


def test_what_an_answer_names_elsewhere_is_not_fetched(demo, open_page):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        host = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
        demo.voice.say("fine", end=True)
        page = open_page()
        ask(page, f"![a]({host}/a.png) <img src='{host}/b.png'> <b style='background:url({host})'>")
        page.get_by_text("fine").wait_for()
        page.wait_for_function(
            "[...document.querySelectorAll('#chat .message img')].every(one => one.complete)"
        )
        assert page.locator("#chat .message img").count() == 1, "the Markdown picture alone"
        assert f"<img src='{host}/b.png'>" in page.inner_text(USER).replace(JOINER, "")
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_tags_are_shown_and_copied_as_written_and_markdown_is_drawn(demo, open_page):
    answer = (
        "<ref>a cat</ref><box>[[1, 2, 3, 4]]</box> is <b>not</b> **bold**\n\n"
        "<table><tr><td>cell\n\n`<i>code</i>`\n\n| a | b |\n|---|---|\n| <td> | 2 |"
    )
    demo.voice.say(answer, end=True)
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Is 1 <2? And <u>this</u>?")
    page.wait_for_selector("#chat [aria-label=Retry]")
    settled(page)
    shown = page.inner_text(BOT).replace(JOINER, "")
    for written in (
        "<ref>a cat</ref><box>[[1, 2, 3, 4]]</box>",
        "<b>not</b>",
        "<table><tr><td>cell",
    ):
        assert written in shown, shown
    drawn = {tag: page.locator(f"{BOT} {tag}").count() for tag in ("b", "i", "strong", "table")}
    assert drawn == {"b": 0, "i": 0, "strong": 1, "table": 1}
    assert page.inner_text(f"{BOT} code").replace(JOINER, "") == "<i>code</i>"
    page.locator("#chat [aria-label*=opy]").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == answer


def test_the_reply_streams_and_stops(demo, open_page):
    demo.voice.say("ab ", seconds=0.02)
    page = open_page()
    ask(page, "Talk for ever.")
    page.wait_for_selector(BOT)
    lengths = []
    for _ in range(4):
        lengths.append(len(page.inner_text(BOT)))
        page.wait_for_timeout(150)
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1], "it does not stream"
    page.press("#box textarea", "Escape")
    settled(page)
    said = page.inner_text(BOT)
    spoken = demo.voice.said
    page.wait_for_timeout(200)
    assert page.inner_text(BOT) == said and demo.voice.said == spoken, "it does not stop"
    assert said.startswith("ab ab")


def test_a_sample_question_is_asked_with_one_click(demo, open_page):
    demo.voice.say("see 3 (C)", end=True)
    page = open_page()
    page.locator("#chat .example").first.click()
    page.get_by_text("see 3 (C)").wait_for()
    assert "How many yellow" in page.inner_text(USER + " >> nth=-1")
    assert page.locator("#chat .message img").count() == 1


def test_two_visitors_do_not_see_each_other(demo, open_page):
    demo.voice.say("fine", end=True)
    first, second = open_page(), open_page()
    ask(first, "I am the first.")
    first.get_by_text("fine").wait_for()
    demo.voice.say("well", end=True)
    ask(second, "I am the second.")
    second.get_by_text("well").wait_for()
    assert second.get_by_text("I am the first.").count() == 0
    settled(first)
    # One speaks while the other waits; the first is stopped, and the second alone goes on.
    demo.voice.say("ab ", seconds=0.02)
    ask(first, "And now?")
    first.locator(BOT).nth(1).wait_for()
    ask(second, "And I?")
    second.get_by_text("And I?").wait_for()
    assert first.get_by_text("I am the second.").count() == 0
    assert second.locator(BOT).count() == 1
    first.press("#box textarea", "Escape")
    settled(first)
    said = first.locator(BOT).nth(1).inner_text()
    second.locator(BOT).nth(1).wait_for()
    assert second.locator("#box .stop-button").is_visible()
    assert first.locator(BOT).nth(1).inner_text() == said and said.startswith("ab ")
    second.press("#box textarea", "Escape")
    settled(second)


def test_a_conversation_that_the_server_lost_is_told(demo, open_page):
    """As after a new start under an open page: it would vanish with the next question."""
    demo.voice.say("fine", end=True)
    page = open_page()
    ask(page, "How are you?")
    page.get_by_text("fine").wait_for()
    settled(page)
    for folder in demo.folder.glob("talk-*"):
        shutil.rmtree(folder)
    ask(page, "And now?")
    page.get_by_text("This conversation is no longer there; begin a new chat.").wait_for()
    assert page.input_value("#box textarea") == "And now?"
    assert page.inner_text(BOT) == "fine"
    page.click("#new-chat")
    page.get_by_text("Show a picture or a video, ask about it").wait_for()
    ask(page, "And now?")
    page.wait_for_selector(BOT)
    settled(page)


def test_a_refused_file_is_told_and_the_question_stays(demo, open_page, pictures, tmp_path):
    demo.voice.say("Good.", end=True)
    (tmp_path / "program.png").write_bytes(b"MZ" + bytes(100))
    page = open_page()
    attach(page, [str(tmp_path / "program.png"), pictures[0]])
    ask(page, "What is it?")
    page.get_by_text("program.png is no picture (PNG").wait_for()
    assert page.input_value("#box textarea") == "What is it?"
    assert not page.locator("#chat .error").is_visible()
    page.locator("#box .thumbnail-item .delete-button").first.click()
    page.press("#box textarea", "Enter")
    page.get_by_text("Good.").wait_for()
    assert page.locator("#chat .message img").count() == 1


def test_errors_are_one_sentence(demo, open_page, pictures, capfd):
    demo.voice.say("never")
    demo.voice.fail = True
    page = open_page()
    attach(page, pictures[:1])
    ask(page, "Fail, please.")
    toast = page.locator("[data-testid=toast-body]")
    toast.wait_for()
    assert "its log says what" in toast.inner_text()
    assert "secret" not in page.content() and "Traceback" not in page.content()
    settled(page)
    assert page.input_value("#box textarea") == "Fail, please.", "the question was lost"
    assert page.locator("#chat .message").count() == 0, "it would be asked twice"
    assert "secret detail" in capfd.readouterr().err
    demo.voice.say("Well.", end=True)
    page.locator("#box .thumbnail-item").wait_for()
    page.press("#box textarea", "Enter")
    page.get_by_text("Well.").wait_for()
    assert page.locator("#chat .message img").count() == 1
    assert page.get_by_text("Fail, please.").count() == 1
