"""What does the server remember of one visitor? The conversation, its pictures, what is asked."""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.limits import Limits
from vlm.chat_session import ChatSession, Sampling
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor


@dataclass(frozen=True)
class Served:
    """What all visitors share."""

    name: str
    model: VlmForConditionalGeneration
    processor: VlmProcessor
    limits: Limits
    folder: Path  # pictures and uploads; the only folder whose files are given out


@dataclass
class Talk:
    """One visitor's conversation. Pictures are called by their path in `folder`."""

    chat: ChatSession
    folder: Path
    question: str | None = None  # shown already, and not answered yet
    answering: bool = False
    stopped: bool = False  # the visitor wants no more of the reply

    def stop(self) -> None:
        """End the reply, also one that has not begun."""
        self.stopped = True
        self.chat.stop()

    def num_pictures(self) -> int:
        """Return how many pictures the conversation has, with those of the next question."""
        return len(self.chat.images) + len(self.chat.waiting)


def begin(served: Served) -> Talk:
    """Return an empty conversation with a folder of its own, whose name nobody can guess."""
    folder = served.folder / secrets.token_urlsafe(16)
    folder.mkdir()
    return Talk(ChatSession(served.model, served.processor, Sampling()), folder)


def forget(talk: Talk | None) -> None:
    """Stop what runs and remove the pictures, when a visitor has left."""
    if talk is not None:
        talk.stop()
        shutil.rmtree(talk.folder, ignore_errors=True)


def shown(talk: Talk, picture_word: str) -> list[dict[str, Any]]:
    """Return the conversation as `gr.Chatbot` takes it: pictures and text apart.

    Args:
        talk: the conversation; its unanswered question comes last.
        picture_word: begins the pictures' alternative text.
    """
    turns = [message for message in talk.chat.messages if message["role"] != "system"]
    names = [name for name, _ in [*talk.chat.images, *talk.chat.waiting]]
    if talk.question is not None:
        waiting = [{"type": "image"} for _ in talk.chat.waiting]
        text = {"type": "text", "text": talk.question}
        turns = [*turns, {"role": "user", "content": [*waiting, text]}]
    messages, seen = [], 0
    for turn in turns:
        num = len(turn["content"]) - 1
        pictures = [
            {"path": names[i], "alt_text": f"{picture_word} {i + 1}"}
            for i in range(seen, seen + num)
        ]
        seen += num
        if pictures:  # apart from the text: gradio's edit button fails in a mixed message
            messages.append({"role": turn["role"], "content": pictures})
        messages.append({"role": turn["role"], "content": turn["content"][-1]["text"]})
    return messages


def question_at(messages: Sequence[Mapping[str, Any]], index: int) -> int:
    """Return which question, counted from 0, the message `index` of `shown` belongs to."""
    texts = [isinstance(message["content"], str) for message in messages]
    asked = [message["role"] == "user" for message in messages]
    return sum(text and user for text, user in zip(texts[:index], asked, strict=False))
