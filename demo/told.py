"""How does an error become one sentence on the page? Tracebacks go to the server's log alone."""

import errno
import functools
import html
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import gradio as gr

from demo.wording import language_of, say
from vlm.errors import UserError


def language(request: gr.Request | None) -> str:
    """Return the language of whoever asks."""
    return language_of(None if request is None else request.headers.get("accept-language"))


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler, which may be a generator: its errors become `gr.Error`.

    The handler must take the request, which tells the language.
    """

    @functools.wraps(handler)
    def call(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise _sentence(error, args) from None

    @functools.wraps(handler)
    def generate(*args: Any) -> Any:
        try:
            yield from handler(*args)
        except Exception as error:
            raise _sentence(error, args) from None

    return generate if inspect.isgeneratorfunction(handler) else call


def _sentence(error: Exception, args: tuple[Any, ...]) -> gr.Error:
    """Return what the page shows of an error; what is not the visitor's to mend is logged."""
    if isinstance(error, gr.Error):
        return error
    words = language(next((value for value in args if isinstance(value, gr.Request)), None))
    if isinstance(error, UserError):
        # Gradio shows it as HTML, and it may repeat the name of a file, or speak of `<image>`.
        sentence = html.escape(reason(error, words))
        return gr.Error(sentence, print_exception=False, title="")
    if is_disk_full(error):
        return gr.Error(say(words, "disk_full"), print_exception=False, title="")
    traceback.print_exception(error)
    return gr.Error(say(words, "our_fault"), print_exception=False, title="")


def is_disk_full(error: Exception) -> bool:
    """Tell whether a file could not be written for want of room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason(error: UserError, language: str, **renamed: object) -> str:
    """Return what an error says, in the page's words where it has some for the error's code.

    Args:
        error: of the model's code, which speaks English to whoever runs it.
        language: of the page.
        renamed: facts to tell otherwise, such as a path.
    """
    if error.code is None:
        return str(error)
    return say(language, error.code, **{**error.facts, **renamed})
