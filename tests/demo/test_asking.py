"""Is a question answered with every setting of the page, and given back where it is not?"""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

from gradio import Error

from demo.handlers import Handlers
from demo.limits import Limits
from demo.talk import Served, Talk, Talks
from vlm.chat_session import ChatSession, Sampling

REQUEST = cast(Any, SimpleNamespace(headers={"accept-language": "en"}, session_hash="one"))


@pytest.fixture
def talk(make_model, tmp_path) -> Talk:
    return Talk(ChatSession(*make_model(max_position_embeddings=96), Sampling()), tmp_path)


@pytest.fixture
def handlers(talk: Talk, tmp_path) -> Handlers:
    return Handlers(Served("x", talk.chat.model, talk.chat.processor, Limits(), tmp_path, Talks(1)))


@pytest.mark.parametrize(
    "settings",
    [
        (0, 1, 2048, 1),
        (2, 1, 2048, 1),
        (2, 0.05, 1, 1),
        (0.05, 1, 1, 8),
        (2, 1, 4, 8),
        (0, 1, 4, 8),
    ],
)
def test_sliders_at_their_ends(handlers: Handlers, talk: Talk, settings):
    """Gradio sends whole numbers as int, whatever the slider's step."""
    talk.put("Hi?")
    *_, (messages, _) = handlers.answer(talk, *settings, REQUEST)
    assert [message["role"] for message in messages] == ["user", "assistant"]


@pytest.mark.parametrize("num_said", [0, 12])
def test_a_question_the_model_fails_at_goes_back_into_the_box(
    handlers: Handlers, talk: Talk, make_image, monkeypatch, num_said: int
):
    """Also where it had begun to answer; the conversation does not keep it."""
    ids, said = talk.chat.processor.tokenizer("ab ").input_ids, []

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        if len(said) == num_said:
            raise ZeroDivisionError
        said.append(ids[len(said) % len(ids)])
        scores = torch.zeros(*hidden.shape[:-1], len(talk.chat.processor.tokenizer))
        scores[..., said[-1]] = 9.0
        return scores

    monkeypatch.setattr(talk.chat.model, "compute_logits", fail)
    talk.chat.add_image(make_image(), "cat.png")
    talk.put("Who?")
    with pytest.raises(Error, match="went wrong"):
        list(handlers.answer(talk, 0, 1, 30, 1, REQUEST))
    messages, box = handlers.take_back(talk, REQUEST)
    assert messages == [] and box["value"] == {"text": "Who?", "files": ["cat.png"]}
    assert talk.chat.messages == [] and not talk.is_busy


def test_a_question_edited_to_nothing_is_not_asked(handlers: Handlers, talk: Talk):
    list(talk.chat.ask("Who?"))
    before = list(talk.chat.messages)
    with pytest.raises(Error, match="Write a question first"):
        handlers.edit(SimpleNamespace(index=0, value=" \n"), talk, REQUEST)
    assert talk.question is None and talk.chat.messages == before
