"""Is a question answered with every setting of the page?"""

from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

from demo.handlers import Handlers
from demo.limits import Limits
from demo.talk import Served, Talk, Talks
from vlm.chat_session import ChatSession, Sampling

REQUEST = cast(Any, SimpleNamespace(headers={"accept-language": "en"}, session_hash="one"))


@pytest.fixture
def talk(make_model, tmp_path) -> Talk:
    return Talk(ChatSession(*make_model(max_position_embeddings=48), Sampling()), tmp_path)


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
