"""Do two models answer the same questions side by side, and is it said when they do not fit?"""

from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

from gradio import Error

from demo.comparing import Second, follow, new_chat, restore
from demo.fits import check_fits, weights_bytes
from demo.limits import Limits
from demo.saved import pack, unpack
from demo.talk import Served, Talk, Talks, shown
from vlm.chat_session import ChatSession, Sampling
from vlm.errors import UserError

REQUEST = SimpleNamespace(headers={"accept-language": "en"}, session_hash="one")
SETTINGS = (0.0, 1.0, 5, 1)


@pytest.fixture(scope="module")
def both(make_model, tmp_path_factory):
    """(first, second) sessions of models that differ in everything; a folder."""
    limits, folder = Limits(), tmp_path_factory.mktemp("served")
    changes = [
        {},
        {"kind": "gpt2", "tiling": {"type": "anyres"}, "connector": {"type": "perceiver"}},
    ]
    models = [make_model(max_position_embeddings=512, **one) for one in changes]
    talks = Talks(4)
    return [Served("x", *parts, limits, folder, talks) for parts in models]


def said(chat: ChatSession) -> list[tuple[str, str]]:
    return [(m["role"], m["content"][-1]["text"]) for m in chat.messages]


def ask(served, talk: Talk, text: str) -> None:
    talk.put(text)
    talk.question = None
    list(talk.chat.ask(text))


def test_the_second_is_asked_what_the_first_was(both, make_image, tmp_path):
    first, other = both
    talk = Talk(ChatSession(first.model, first.processor, Sampling(max_new_tokens=4)), tmp_path)
    second = Second(other)

    def answer() -> list:
        return list(second.answer(talk, *SETTINGS, REQUEST))

    talk.chat.add_image(make_image(), "cat.png")
    ask(first, talk, "What?")  # the first is ahead: the picture is no longer waiting there
    shown = answer()
    chat = talk.beside.chat
    assert [role for role, _ in said(chat)] == ["user", "assistant"]
    assert [name for name, _ in chat.images] == ["cat.png"] and not chat.waiting
    assert chat.model is other.model and shown[-1][-1]["content"] == said(chat)[1][1]
    own = said(chat)[1][1]
    ask(first, talk, "And why?")
    answer()
    assert said(chat)[1][1] == own and said(chat)[2] == ("user", "And why?")
    # The first question is asked again in other words: the second goes back too.
    talk.chat.rewind(0)
    ask(first, talk, "Which?")
    answer()
    assert [text for role, text in said(chat) if role == "user"] == ["Which?"]
    assert [name for name, _ in chat.images] == ["cat.png"]
    assert new_chat(talk) == [] and talk.beside is None


def test_a_conversation_the_second_does_not_know_is_taken_over(both, tmp_path):
    first, other = both
    talk = Talk(ChatSession(first.model, first.processor, Sampling(max_new_tokens=3)), tmp_path)
    ask(first, talk, "Hello?")
    talk.put("More?")
    chat = ChatSession(other.model, other.processor, Sampling())
    second = Talk(chat, tmp_path)
    follow(second, talk.asked)
    assert said(chat) == said(talk.chat), "with the first's own words"
    list(chat.ask("More?"))
    page = [message["content"] for message in shown(second, "en")]
    assert [text.startswith("*The first model’s words:*") for text in page] == [
        *(False, True),
        *(False, False),
    ]
    chat.messages[1]["content"][0]["text"] = "changed"
    assert said(talk.chat)[1][1] != "changed"


def test_both_are_saved_and_go_on_with_their_own_words(both, make_image, tmp_path):
    first, other = both
    talk = Talk(ChatSession(first.model, first.processor, Sampling(max_new_tokens=3)), tmp_path)
    make_image().save(tmp_path / "cat.png")
    talk.chat.add_image(tmp_path / "cat.png")
    ask(first, talk, "Who?")
    list(Second(other).answer(talk, *SETTINGS, REQUEST))
    words = {"first": "I", "second": "The other"}
    for name, one in (("first", talk), ("second", talk.beside)):
        one.chat.messages[1]["content"][0]["text"] = words[name]
    assert pack(talk.chat, tmp_path / "x.zip", talk.beside.chat)
    restored = unpack(tmp_path / "x.zip", talk.chat, tmp_path, Limits(), "en")
    assert [len(record.images) for record in (restored, restored.second)] == [1, 1]
    again = Talk(ChatSession(first.model, first.processor, Sampling(max_new_tokens=3)), tmp_path)
    restored.put_into(again.chat)
    restore(other, again, restored.second)
    ask(first, again, "And?")
    list(Second(other).answer(again, *SETTINGS, REQUEST))
    assert said(again.chat)[1][1] == "I" and said(again.beside.chat)[1][1] == "The other"
    assert [m["content"] for m in shown(again.beside, "en")][2] == "The other"
    restore(other, again, None)
    assert again.beside is None


def test_what_the_second_cannot_do_leaves_nothing_behind(both, tmp_path):
    first, other = both
    talk = Talk(ChatSession(first.model, first.processor, Sampling()), tmp_path)
    talk.chat.add_image(Image.new("RGB", (64, 64)), "cat.png")
    talk.put("long " * 300)
    with pytest.raises(Error, match="tokens"):
        list(Second(other).answer(talk, *SETTINGS, REQUEST))
    assert talk.beside.question is None and not talk.beside.chat.waiting
    assert not talk.beside.answering and said(talk.beside.chat) == []
    talk.stop()
    assert talk.beside.stopped
    assert len(list(Second(other).answer(talk, *SETTINGS, REQUEST))) == 1, "stopped before"


def test_models_that_do_not_fit_are_told_before_they_are_loaded(model_folder):
    size = weights_bytes(model_folder, None)
    assert size == sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    assert weights_bytes(model_folder, "bfloat16") == size // 2
    check_fits([str(model_folder)] * 2, None, 2 * size)
    with pytest.raises(UserError, match="GB of memory are free; load smaller"):
        check_fits([str(model_folder)] * 2, None, 2 * size - 1)
    check_fits(["someone/on-the-hub"], None, 1)


def test_both_stream_into_one_page_and_come_back_to_it(make_model, browser, tmp_path):
    from demo.server import Address, serving

    models = [make_model(kind=kind) for kind in ("llama", "gpt2")]
    other = ("the <b>second</b>", *models[1])
    with serving("first", *models[0], Limits(), Address(), other) as url:
        context = browser.new_context(viewport={"width": 1100, "height": 760})
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(url)
        page.wait_for_selector("#box textarea")
        assert page.get_by_role("heading", name="the <b>second</b>").first.is_visible()
        page.fill("#box textarea", "Who are you?")
        page.press("#box textarea", "Enter")
        for chat in ("#chat", "#chat-second"):
            page.wait_for_selector(f"{chat} [data-testid=bot]")
            assert page.locator(f"{chat} [data-testid=user]").inner_text() == "Who are you?"
        page.wait_for_selector("#box .submit-button")
        said = [page.inner_text(f"{chat} [data-testid=bot]") for chat in ("#chat", "#chat-second")]
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "talk.zip")
        page.click("#new-chat")
        for chat in ("#chat", "#chat-second"):
            page.wait_for_selector(f"{chat} [data-testid=user]", state="detached")
        with page.expect_file_chooser() as chooser:
            page.click("#open")
        chooser.value.set_files(tmp_path / "talk.zip")
        for chat, words in zip(("#chat", "#chat-second"), said, strict=True):
            page.wait_for_selector(f"{chat} [data-testid=bot]")
            assert page.inner_text(f"{chat} [data-testid=bot]") == words
        assert said[0] != said[1]
        context.close()
