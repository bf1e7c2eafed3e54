"""How does a second model answer the same questions, beside the first?

It follows the first conversation: each question that is posted there goes to both, and both stream
at once. What the second was not asked (a conversation that was opened, a question it failed at), it
takes over from the first, words and all; its page tells whose words these are.
"""

import copy
import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from gradio.events import Dependency

from demo.handlers import Handlers, Messages
from demo.page_parts import ALWAYS, Page
from demo.saved import Restored
from demo.talk import Asked, Served, Talk
from demo.told import told
from vlm.chat_session import ChatSession, Sampling


class Second:
    """The event handlers of the second conversation."""

    def __init__(self, served: Served) -> None:
        """Serve the second model."""
        self.served = served
        self.handlers = Handlers(served)
        self.answer = told(self._follow)

    def _follow(
        self,
        talk: Talk,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        beams: float,
        request: gr.Request,
    ) -> Iterator[Messages | dict[str, Any]]:
        """Yield the second conversation as its reply grows.

        Raises:
            UserError: the question cannot be encoded, or is too long for this model.
        """
        asked = talk.asked
        if asked is None or talk.stopped:
            yield gr.skip()
            return
        second = talk.beside = talk.beside or begin_beside(self.served, talk)
        follow(second, asked)
        second.question, second.stopped = asked.question, False
        try:
            numbers = (temperature, top_p, max_new_tokens, beams)
            for messages, _ in self.handlers.answer(second, *numbers, request):
                yield messages
        finally:
            second.question, second.chat.waiting = None, []


def begin_beside(served: Served, talk: Talk) -> Talk:
    """Return an empty conversation with the second model."""
    return Talk(ChatSession(served.model, served.processor, Sampling()), talk.folder)


def restore(served: Served, talk: Talk, restored: Restored | None) -> None:
    """Let the second conversation go on where it ended; None: it was not saved and begins anew."""
    talk.beside = None
    if restored is not None:
        talk.beside = begin_beside(served, talk)
        restored.put_into(talk.beside.chat)


def follow(second: Talk, asked: Asked) -> None:
    """Bring the second conversation to where the first was when a question was asked there."""
    chat = second.chat
    chat.system = asked.system
    number = len(_questions(asked.messages))
    own = _questions(chat.messages)
    if own[:number] == _questions(asked.messages):
        if len(own) > number:
            chat.rewind(number)
    else:
        chat.messages, chat.images = copy.deepcopy(list(asked.messages)), list(asked.images)
        second.taken_over = len(chat.messages)
    second.taken_over = min(second.taken_over, len(chat.messages))
    if not chat.messages:
        chat.clear()
    chat.waiting = list(asked.waiting)


def _questions(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """Return what was asked."""
    return [message["content"] for message in messages if message["role"] == "user"]


def new_chat(talk: Talk | None) -> Messages:
    """Forget the second conversation."""
    if talk is not None and talk.beside is not None:
        talk.beside.stop()
        talk.beside = None
    return []


def _buttons(talk: Talk | None) -> dict[str, Any]:
    """Return the update of the question box: it sends when neither model speaks."""
    both = [] if talk is None else [talk, *([talk.beside] if talk.beside else [])]
    busy = any(one.answering for one in both)
    return gr.update(submit_btn=not busy, stop_btn=busy)


def mount_comparing(
    page: Page,
    posts: Sequence[Dependency],
    answered: Sequence[Dependency],
    cleared: Sequence[Any],
) -> gr.Chatbot | None:
    """Mount the second conversation and return it; None: there is no second model.

    Args:
        page: where.
        posts: the events that put a question.
        answered: those that gave the first model's answer.
        cleared: what begins a new conversation, to be called with a handler.
    """
    other = page.served.other
    if other is None:
        return None
    with page.chats, gr.Column(min_width=0, elem_id="second"):
        gr.HTML(f"<h2>{html.escape(other.name)}</h2>", padding=False)
        chatbot = page.labels.new(
            gr.Chatbot,
            {"label": "second"},
            elem_id="chat-second",
            show_label=False,
            height="100%",
            layout="bubble",
            buttons=["copy"],
            group_consecutive_messages=False,
            allow_tags=False,
            latex_delimiters=[],
            allow_file_downloads=False,
        )
    handlers = Second(other)
    ends = [*answered]
    for posted in posts:
        ends.append(
            posted.success(
                handlers.answer,
                [page.talk, *page.settings],
                chatbot,
                concurrency_id="second model",
                concurrency_limit=1,
                show_progress="minimal",
                api_visibility="private",
            )
        )
    for end in ends:
        end.then(_buttons, page.talk, page.box, **ALWAYS)
    for event in cleared:
        event(new_chat, page.talk, chatbot, **ALWAYS)
    return chatbot
