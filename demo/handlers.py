"""What happens when a visitor asks, stops, asks again, edits or begins anew?

Asking takes two steps, because the second may wait in the queue: `post` checks the question and
shows it at once, `answer` lets the model speak. What fails in the second goes back into the box.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from demo.as_written import given_back
from demo.sample_questions import FOLDER, SAMPLES
from demo.talk import Served, Talk, begin, question_at, shown
from demo.told import language, told
from demo.uploads import keep_file
from demo.wording import say
from vlm.chat_session import Sampling
from vlm.errors import UserError
from vlm.video import SampledVideo

SECONDS_BETWEEN_UPDATES = 0.05
Messages = list[dict[str, Any]]


class Handlers:
    """The page's event handlers; each takes and gives back the visitor's `Talk`."""

    def __init__(self, served: Served) -> None:
        """Serve one model; the methods are wrapped so that errors are told in a sentence."""
        self.served = served
        self.post, self.answer = told(self._post), told(self._answer)
        self.retry, self.edit = told(self._retry), told(self._edit)
        self.sample = told(self._sample)
        self.take_back, self.new_chat = told(self._take_back), told(self._new_chat)
        self.show_again = told(self._show_again)

    def _post(
        self,
        question: Mapping[str, Any],
        system: str | None,
        talk: Talk | None,
        num_seen: float,
        request: gr.Request,
    ) -> tuple[Talk, Messages, dict[str, Any]]:
        """Check a question and its files, and show it; `num_seen` messages stand on the page.

        Raises:
            UserError: it is empty or too long, a file cannot be taken, or the server no longer has
                the conversation that the page shows; nothing is kept.
        """
        words = language(request)
        if num_seen and (talk is None or talk.is_gone):
            raise UserError(say(words, "gone"))
        talk = self.open_talk(talk, request)
        text, system = question["text"].strip(), (system or "").strip()
        files = [Path(path) for path in question["files"]]
        self._check(text, files, "" if talk.chat.messages else system, talk, words)
        self._take(files, talk, words)
        if not talk.chat.messages:
            waiting, talk.chat.system = talk.chat.waiting, system or None
            talk.chat.clear()
            talk.chat.waiting = waiting
        talk.put(text)
        talk.tidy()
        return talk, shown(talk, words), busy_box()

    def _check(self, text: str, files: Sequence[Path], system: str, talk: Talk, words: str) -> None:
        """Refuse what cannot be asked, whatever the files hold.

        Raises:
            UserError: always with the limit.
        """
        limits = self.served.limits
        if talk.question is not None or talk.answering:
            raise UserError(say(words, "still_answering"))
        if not text:
            raise UserError(say(words, "no_question"))
        if len(text) > limits.max_question:
            raise UserError(say(words, "question_too_long", limit=limits.max_question))
        if len(system) > limits.max_question:
            raise UserError(say(words, "system_too_long", limit=limits.max_question))
        ours = (self.served.folder, FOLDER)
        if not all(any(path.resolve().is_relative_to(top) for top in ours) for path in files):
            raise UserError(say(words, "foreign_file"))
        if talk.num_pictures() + len(files) > limits.max_pictures:
            raise UserError(say(words, "too_many_pictures", limit=limits.max_pictures))

    def _take(self, files: Sequence[Path], talk: Talk, words: str) -> None:
        """Let files, and no others, wait for the next question.

        Raises:
            UserError: one is neither a picture nor a video, or exceeds a limit; none is kept.
        """
        before, talk.chat.waiting = talk.chat.waiting, []
        limits = self.served.limits
        try:
            for path in files:
                kept = keep_file(path, path.name, talk.chat, talk.folder, limits, words)
                talk.chat.waiting.append(kept)
        except BaseException:
            for name, _ in talk.chat.waiting:
                Path(name).unlink()
            talk.chat.waiting = before
            raise

    def open_talk(self, talk: Talk | None, request: gr.Request) -> Talk:
        """Return the visitor's conversation, a new one if there is none, or it had to make room.

        Raises:
            UserError: there are too many visitors.
        """
        if talk is None or talk.is_gone:
            talk = begin(self.served, request.session_hash)
        if talk is None:
            raise UserError(say(language(request), "too_many_visitors"))
        return talk

    def _sample(
        self, clicked: gr.SelectData, system: str | None, talk: Talk | None, request: gr.Request
    ) -> tuple[Talk, Messages, dict[str, Any]]:
        """Ask one of the sample questions."""
        sample = SAMPLES[clicked.index]
        question = {"text": sample.question, "files": [str(sample.path)]}
        return self._post(question, system, talk, 0, request)

    def _answer(
        self,
        talk: Talk,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        beams: float,
        request: gr.Request,
    ) -> Iterator[tuple[Messages, dict[str, Any]]]:
        """Yield the conversation as the reply grows.

        Raises:
            UserError: the question cannot be encoded, or the conversation is too long or gone.
        """
        words = language(request)
        if talk.is_gone:
            raise UserError(say(words, "gone"))
        if talk.question is None or talk.stopped:
            yield self._take_back(talk, request)
            return
        talk.chat.sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=int(max_new_tokens),
            num_beams=int(beams),
        )
        known = {"frames": _most_frames(talk), "reply": talk.chat.kept_for_reply()}
        if talk.chat.fit_videos(talk.question) is not None:
            gr.Info(say(words, "frames_left_out", kept=_most_frames(talk), **known))
        last, talk.answering = 0.0, True
        question, asked = talk.question, talk.asked
        try:
            with closing(talk.chat.ask(question)) as pieces:
                for _ in pieces:
                    talk.question = None  # it is part of the conversation now
                    if talk.stopped:
                        break
                    if time.monotonic() - last > SECONDS_BETWEEN_UPDATES:
                        yield shown(talk, words), gr.skip()
                        last = time.monotonic()
        except Exception:
            if talk.asked is asked:  # or a new chat began meanwhile
                talk.question = question
            raise
        finally:
            talk.answering, talk.used = False, time.monotonic()
        talk.question = None  # also where the reply is empty
        yield shown(talk, words), idle_box()

    def _take_back(self, talk: Talk | None, request: gr.Request) -> tuple[Messages, dict[str, Any]]:
        """Put a question that was not answered back into the box, with its pictures."""
        if talk is None or talk.question is None:
            return _messages(talk, request), idle_box()
        files = [name for name, _ in talk.chat.waiting]
        text, talk.question, talk.chat.waiting = talk.question, None, []
        return _messages(talk, request), idle_box(text, files)

    def _retry(
        self, clicked: gr.RetryData, talk: Talk | None, request: gr.Request
    ) -> tuple[Talk, Messages, dict[str, Any]]:
        """Take an answer back, so that `answer` gives another."""
        return self._again(talk, clicked.index, None, request)

    def _edit(
        self, clicked: gr.EditData, talk: Talk | None, request: gr.Request
    ) -> tuple[Talk, Messages, dict[str, Any]]:
        """Ask another question in place of an earlier one; what followed it is dropped."""
        return self._again(talk, clicked.index, given_back(clicked.value).strip(), request)

    def _again(
        self,
        talk: Talk | None,
        index: int | tuple[int, int],
        text: str | None,
        request: gr.Request,
    ) -> tuple[Talk, Messages, dict[str, Any]]:
        """Take a question back, and ask it, or another, again.

        Raises:
            UserError: the conversation is gone, a reply is being given, or the other question is
                empty or too long; nothing is taken back.
        """
        words = language(request)
        if talk is None or not talk.chat.messages:
            raise UserError(say(words, "gone"))
        if talk.question is not None or talk.answering:
            raise UserError(say(words, "still_answering"))
        if text == "":
            raise UserError(say(words, "no_question"))
        if text is not None and len(text) > self.served.limits.max_question:
            raise UserError(say(words, "question_too_long", limit=self.served.limits.max_question))
        message = index if isinstance(index, int) else index[0]
        before = talk.chat.rewind(question_at(_messages(talk, request), message))
        talk.put(before if text is None else text)
        return talk, _messages(talk, request), busy_box()

    def _show_again(self, talk: Talk | None, request: gr.Request) -> Any:
        """Show what the server has: the page shows an edited question, though it was refused."""
        return _messages(talk, request) or gr.skip()

    def _new_chat(
        self, talk: Talk | None, request: gr.Request
    ) -> tuple[Talk | None, Messages, dict[str, Any]]:
        """Forget the conversation; the system prompt is read anew at the next question."""
        if talk is not None:
            talk.stop()
            talk.chat.clear()
            talk.chat.messages = []
            talk.question = talk.asked = None
            talk.tidy()
        return talk, _messages(talk, request), idle_box("", [])


def stop(talk: Talk | None) -> None:
    """End the reply; the handler that gives it does the rest."""
    if talk is not None:
        talk.stop()


def _most_frames(talk: Talk) -> int:
    """Return how many frames are looked at of the longest video that waits."""
    videos = (medium for _, medium in talk.chat.waiting if isinstance(medium, SampledVideo))
    return max((len(video.frames) for video in videos), default=0)


def _messages(talk: Talk | None, request: gr.Request) -> Messages:
    return [] if talk is None else shown(talk, language(request))


def busy_box() -> dict[str, Any]:
    """Return the update of an emptied question box that can only be told to stop."""
    value = {"text": "", "files": []}
    return gr.update(value=value, submit_btn=False, stop_btn=True)


def idle_box(text: str | None = None, files: list[str] | None = None) -> dict[str, Any]:
    """Return the update of a question box that can send, with a new content if one is given."""
    if text is None:
        return gr.update(submit_btn=True, stop_btn=False)
    value = {"text": text, "files": files or []}
    return gr.update(value=value, submit_btn=True, stop_btn=False)
