"""What does the server remember of one visitor? The conversation, its pictures, what is asked."""

import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.as_written import as_written
from demo.limits import Limits
from demo.strip import strip_file
from demo.wording import say
from vlm.chat_session import ChatSession, Sampling
from vlm.image_processing import Medium
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor
from vlm.video import SampledVideo

IDLE_SECONDS = 600  # after which the conversation of an open page makes room, if need be


@dataclass(frozen=True)
class Served:
    """What all visitors share."""

    name: str
    model: VlmForConditionalGeneration
    processor: VlmProcessor
    limits: Limits
    folder: Path  # pictures and uploads; the only folder whose files are given out
    talks: "Talks"
    other: "Served | None" = None  # a second model that answers the same questions


@dataclass(frozen=True)
class Asked:
    """A question as it was put, for a second model to answer: what came before, and what is new."""

    messages: Sequence[dict[str, Any]]
    images: Sequence[tuple[str, Medium]]
    waiting: Sequence[tuple[str, Medium]]
    question: str
    system: str | None


@dataclass(eq=False)
class Talk:
    """One visitor's conversation. Pictures are called by their path in `folder`."""

    chat: ChatSession
    folder: Path
    question: str | None = None  # shown already, and not answered yet
    answering: bool = False
    stopped: bool = False  # the visitor wants no more of the reply
    asked: Asked | None = None  # the last question
    beside: "Talk | None" = None  # the same questions, put to a second model
    taken_over: int = 0  # messages at the beginning that the first model's conversation had
    used: float = field(default_factory=time.monotonic)  # when it was asked or answered last

    def put(self, question: str) -> None:
        """Let a question be answered, about what is waiting."""
        self.question, self.stopped, chat = question, False, self.chat
        self.used = time.monotonic()
        self.asked = Asked(
            *(list(chat.messages), list(chat.images), list(chat.waiting), question, chat.system)
        )

    def stop(self) -> None:
        """End the reply, also one that has not begun."""
        self.stopped = True
        self.chat.stop()
        if self.beside is not None:
            self.beside.stop()

    def tidy(self) -> None:
        """Remove files that neither conversation has, zips too; the question box must be empty."""
        chats = [self.chat, *([self.beside.chat] if self.beside else [])]
        kept = {Path(path).stem for chat in chats for path, _ in [*chat.images, *chat.waiting]}
        for file in self.folder.glob("*"):  # nothing where it was removed
            if file.stem.removeprefix("strip-").partition("-")[0] not in kept:
                file.unlink(missing_ok=True)

    @property
    def is_busy(self) -> bool:
        """Whether a question waits for its reply, or a model speaks."""
        return self.question is not None or self.is_answered

    @property
    def is_answered(self) -> bool:
        """Whether a model speaks."""
        return self.answering or (self.beside is not None and self.beside.answering)

    @property
    def is_gone(self) -> bool:
        """Whether it had to make room for another."""
        return not self.folder.is_dir()

    def num_pictures(self) -> int:
        """Return how many pictures the conversation has, with those of the next question."""
        return len(self.chat.images) + len(self.chat.waiting)


class Talks:
    """All conversations, by the session that gradio gives every opened page."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[str, Talk] = {}
        self._open: Counter[str] = Counter()  # connections that pages hold while they are open
        self._lock = threading.Lock()  # of `_kept`: handlers run in several threads

    @contextmanager
    def page_open(self, session: str) -> Iterator[None]:
        """Know, while the block runs, that a session has an open page."""
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            if not self._open[session]:
                del self._open[session]

    def enter(self, session: str, talk: Talk) -> bool:
        """Keep a new conversation, if need be in place of one that is idle; False: no room."""
        with self._lock:
            before = self._kept.pop(session, None)
            if before is not None:
                _remove(before)
            while len(self._kept) >= self._most:
                idle = self._most_idle()
                if idle is None:
                    return False
                _remove(self._kept.pop(idle))
            self._kept[session] = talk
        return True

    def _most_idle(self) -> str | None:
        """Return whose conversation makes room.

        At first those without an open page, which was closed or never was (a script makes up as
        many sessions as it likes); then who has asked nothing for a while.
        """
        since = time.monotonic() - IDLE_SECONDS
        idle = [
            (session in self._open, talk.used, session)
            for session, talk in self._kept.items()
            if not talk.is_answered and (session not in self._open or talk.used < since)
        ]
        return min(idle)[2] if idle else None

    def leave(self, session: str | None) -> None:
        """Stop the reply to a page that was closed; it may come back for a while.

        Gradio calls `forget` an hour later.
        """
        talk = self._kept.get(session or "")
        if talk is not None:
            talk.stop()

    def stop_all(self) -> None:
        """End every reply."""
        for talk in list(self._kept.values()):
            talk.stop()

    def forget(self, talk: Talk | None) -> None:
        """Remove a conversation and its pictures."""
        if talk is not None:
            with self._lock:
                self._kept = {key: kept for key, kept in self._kept.items() if kept is not talk}
                _remove(talk)


def begin(served: Served, session: str | None) -> Talk | None:
    """Return an empty conversation with a folder of its own, whose name nobody can guess.

    None: there are too many visitors already.
    """
    chat = ChatSession(served.model, served.processor, Sampling())
    talk = Talk(chat, served.folder / f"talk-{secrets.token_urlsafe(16)}")
    talk.folder.mkdir()
    if not served.talks.enter(session or "", talk):
        talk.folder.rmdir()
        return None
    sweep_uploads(served.folder)
    return talk


def sweep_uploads(folder: Path, seconds: float = 3600) -> None:
    """Remove uploads that are older; what conversations use was drawn anew into their folders."""
    for upload in folder.glob("*"):
        if not upload.name.startswith("talk-") and upload.stat().st_mtime < time.time() - seconds:
            shutil.rmtree(upload, ignore_errors=True)


def _remove(talk: Talk) -> None:
    talk.stop()
    talk.chat.clear()
    talk.asked = talk.beside = None
    shutil.rmtree(talk.folder, ignore_errors=True)


def shown(talk: Talk, language: str) -> list[dict[str, Any]]:
    """Return the conversation as `gr.Chatbot` takes it: pictures and text apart.

    Args:
        talk: the conversation; its unanswered question comes last.
        language: of the pictures' alternative texts, and of what is said of other models' words.
    """
    has_system = any(message["role"] == "system" for message in talk.chat.messages)
    turns = talk.chat.messages[has_system:]
    others_end = talk.taken_over - has_system
    media = [*talk.chat.images, *talk.chat.waiting]
    if talk.question is not None:
        waiting = [{"type": "image"} for _ in talk.chat.waiting]
        text = {"type": "text", "text": talk.question}
        turns = [*turns, {"role": "user", "content": [*waiting, text]}]
    messages: list[dict[str, Any]] = []
    seen = 0
    for place, turn in enumerate(turns):
        num = len(turn["content"]) - 1
        files = [
            {"path": path, "alt_text": f"{say(language, 'picture')} {number + 1}"}
            for number in range(seen, seen + num)
            for path in _shown_files(*media[number])
        ]
        seen += num
        if files:  # apart from the text: gradio's edit button fails in a mixed message
            messages.append({"role": turn["role"], "content": files})
        text = as_written(turn["content"][-1]["text"])
        if turn["role"] == "assistant" and place < others_end:
            text = f"*{say(language, 'said_by_first')}*\n\n{text}"
        messages.append({"role": turn["role"], "content": text})
    return messages


def _shown_files(path: str, medium: Any) -> list[str]:
    """Return what is shown of a picture or video: itself, and of a video the frames looked at."""
    if isinstance(medium, SampledVideo):
        return [path, str(strip_file(medium, Path(path)))]
    return [path]


def question_at(messages: Sequence[Mapping[str, Any]], index: int) -> int:
    """Return which question, counted from 0, the message `index` of `shown` belongs to."""
    texts = [isinstance(message["content"], str) for message in messages]
    asked = [message["role"] == "user" for message in messages]
    return sum(text and user for text, user in zip(texts[:index], asked, strict=False))
