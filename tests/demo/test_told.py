"""Is every reason that a visitor can meet told in the page's language, and no other fault shown?"""

import ast
import errno
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (make extras EXTRAS=demo)")

import gradio as gr

import vlm
from demo.limits import Limits
from demo.told import reason, told
from demo.uploads import keep_file
from demo.wording import LANGUAGES, say
from vlm.chat_session import ChatSession, Sampling
from vlm.errors import UserError

CHINESE = gr.Request(headers={"accept-language": "zh-CN"})  # pyright: ignore[reportArgumentType]


def raised_with_codes() -> dict[str, set[str]]:
    """Code -> facts, of every UserError in the model's code that has a code."""
    found = {}
    for file in Path(vlm.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "UserError":
                for code in call.args[1:]:
                    assert isinstance(code, ast.Constant)
                    found[code.value] = {str(fact.arg) for fact in call.keywords}
    return found


def test_every_code_has_its_sentence_in_both_languages():
    codes = raised_with_codes()
    assert len(codes) > 10 and {"video_long", "image_token"} <= codes.keys()
    for code, facts in codes.items():
        for language in LANGUAGES:
            numbers = dict.fromkeys(facts, 3)
            assert say(language, code, **numbers) != code


def test_reasons_are_told_in_the_language_of_the_page():
    error = UserError("video /a/b.mp4 is empty", "video_empty", path="/a/b.mp4")
    assert reason(error, "zh", path="b.mp4") == "b.mp4 是空文件（0 字节）。"
    assert reason(error, "en", path="b.mp4") == "b.mp4 is empty (0 bytes)."
    assert reason(UserError("nobody translated this"), "zh") == "nobody translated this"


def test_a_chinese_visitor_is_told_in_chinese_why_a_video_is_refused(make_model, tmp_path: Path):
    chat = ChatSession(*make_model(), Sampling())
    (tmp_path / "空.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"空\.mp4 是空文件"):
        keep_file(tmp_path / "空.mp4", "空.mp4", chat, tmp_path, Limits(), "zh")


def fail_with(error: Exception) -> str:
    def fail(request: Any) -> None:
        raise error

    with pytest.raises(gr.Error) as shown:
        told(fail)(CHINESE)
    return shown.value.message


def test_a_full_disk_and_a_fault_of_ours_are_one_sentence(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/secret/a.png")
    assert fail_with(full) == LANGUAGES["zh"]["disk_full"]
    assert capsys.readouterr().err == "", "nothing to mend in the code"
    assert fail_with(OSError(errno.EIO, "secret")) == LANGUAGES["zh"]["our_fault"]
    assert "secret" in capsys.readouterr().err
