"""How does an error become one sentence on the page? Tracebacks go to the server's log alone."""

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
    if isinstance(error, UserError):
        # Gradio shows it as HTML, and it may repeat the name of a file, or speak of `<image>`.
        return gr.Error(html.escape(str(error)), print_exception=False, title="")
    traceback.print_exception(error)
    request = next((value for value in args if isinstance(value, gr.Request)), None)
    return gr.Error(say(language(request), "our_fault"), print_exception=False, title="")
