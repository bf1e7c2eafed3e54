"""Are tags shown as text, and is a question asked again as it was written?"""

from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

from demo.as_written import JOINER, as_written, given_back
from demo.handlers import Handlers
from demo.limits import Limits
from demo.talk import Served, Talk, Talks, shown
from vlm.chat_session import ChatSession, Sampling

REQUEST = cast(Any, SimpleNamespace(headers={"accept-language": "en"}, session_hash="one"))


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("<box>1</box>", "<~box>1<~/box>"),
        ("<!-- x --> <?y?>", "<~!-- x --> <~?y?>"),
        ("`<b>` <|x|>", "`<~b>` <|x|>"),
        ("1 < 2 <3 <= 4 &lt; <", "1 < 2 <3 <= 4 &lt; <"),
    ],
)
def test_only_what_would_be_a_tag_is_marked(text: str, marked: str):
    assert as_written(text).replace(JOINER, "~") == marked
    assert given_back(as_written(text)) == text


def test_an_edited_question_is_asked_as_it_is_seen(make_model, tmp_path):
    served = Served("x", *make_model(), Limits(), tmp_path, Talks(1))
    talk = Talk(ChatSession(served.model, served.processor, Sampling(max_new_tokens=1)), tmp_path)
    list(talk.chat.ask("What is <b>?"))
    seen = shown(talk, "en")[0]["content"]
    assert JOINER in seen
    clicked = SimpleNamespace(index=0, value=seen.replace("b", "u"))
    Handlers(served).edit(clicked, talk, REQUEST)
    assert talk.question == "What is <u>?"
