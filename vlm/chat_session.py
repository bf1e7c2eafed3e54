"""How does a conversation with a model go on, turn by turn, apart from any screen?"""

import json
import threading
from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from vlm.errors import UserError
from vlm.image_processing import Medium
from vlm.images import load_image
from vlm.long_context import context_length
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor
from vlm.video import DEFAULT_LIMITS, SampledVideo, VideoLimits, sample_video, thin


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn; temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1  # above 1 the reply comes in one piece

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"--temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if self.num_beams < 1:
            raise UserError(f"--num-beams must be at least 1, not {self.num_beams}")

    def generate_options(self) -> dict[str, Any]:
        """Return the arguments of `generate`."""
        options: dict[str, Any] = {"num_beams": self.num_beams}
        if self.temperature == 0:
            # None unsets what a checkpoint's generation config may hold, which would warn.
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return options | {
            "do_sample": True,
            "temperature": float(self.temperature),  # transformers refuses an int, such as 2
            "top_p": self.top_p,
            "top_k": 0,
        }


class _Stop(StoppingCriteria):
    """Ends generation when asked to from another thread."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class ChatSession:
    """The turns so far, the pictures they speak of, and those waiting for the next question.

    `images` and `waiting` hold names with pictures and videos, in the order of the conversation.
    """

    def __init__(
        self,
        model: VlmForConditionalGeneration,
        processor: VlmProcessor,
        sampling: Sampling,
        system: str | None = None,
    ) -> None:
        """Begin an empty conversation; `system` is its first message, and survives `clear`."""
        self.model, self.processor, self.sampling = model, processor, sampling
        self.system = system
        self._halt = _Stop()
        self.clear()

    def clear(self) -> None:
        """Forget all turns and pictures."""
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append(_message("system", self.system))
        self.images: list[tuple[str, Medium]] = []
        self.waiting: list[tuple[str, Medium]] = []

    def add_image(self, source: str | Path | Image.Image, name: str | None = None) -> None:
        """Load a picture for the next question.

        Raises:
            UserError: it cannot be read.
        """
        self.waiting.append((name or str(source), load_image(source)))

    def add_video(
        self,
        source: str | Path | SampledVideo,
        name: str | None = None,
        limits: VideoLimits = DEFAULT_LIMITS,
    ) -> SampledVideo:
        """Load the frames of a video that the model looks at, for the next question.

        Args:
            source: a file, or its frames.
            name: what it is called when the conversation is saved.
            limits: what is refused.

        Raises:
            UserError: it cannot be read, or exceeds a limit.
        """
        if not isinstance(source, SampledVideo):
            processor = self.processor.image_processor
            options = {"limits": limits, "target_size": max(224, processor.view_size), "threads": 0}
            source = sample_video(source, **processor.video_config.sampling(), **options)
        self.waiting.append((name or source.name, source))
        return source

    def fit_videos(self, text: str) -> str | None:
        """Leave out frames of the waiting videos until question and reply fit the model's context.

        `ask` does so itself; call this before to tell the user.

        Returns:
            a sentence that says what was left out; None: nothing.
        """
        videos = [medium for _, medium in self.waiting if isinstance(medium, SampledVideo)]
        limit, most = self._limit(), max((len(video.frames) for video in videos), default=0)
        if limit is None or not videos:
            return None
        reply = self.kept_for_reply()
        room = limit - reply
        messages = [*self.messages, _message("user", text, self.waiting)]
        before = [self.processor.shown(medium) for _, medium in self.images]

        def too_long(frames: int) -> bool:
            waiting = [self.processor.shown(_thinned(medium, frames)) for _, medium in self.waiting]
            return self.processor.prompt_length(messages, before + waiting) > room

        # As many as fit; one where none does, and the error then says what is too long.
        fitting = max(1, bisect_left(range(1, most + 1), True, key=too_long))
        if fitting == most:
            return None
        self.waiting = [(name, _thinned(medium, fitting)) for name, medium in self.waiting]
        return (
            f"{fitting} of {most} frames are looked at: question and reply have to fit the model's "
            f"{limit} tokens, {reply} of them for the reply"
        )

    def kept_for_reply(self) -> int:
        """Return how many tokens the frames of videos leave to the reply: half of them at most.

        A reply may grow longer where there is room. Frames that make room for it are gone from the
        conversation, also when the next reply may only be short.
        """
        limit, most = self._limit(), self.sampling.max_new_tokens
        return most if limit is None else min(most, limit // 2)

    def ask(self, text: str) -> Generator[str]:
        """Add a question and yield the reply in pieces; the reply is kept, even if cut short.

        Closing the iterator stops the model. Videos are shown with as many frames as fit. Where the
        model fails, the question is taken back, and its pictures wait again.

        Raises:
            UserError: the conversation cannot be encoded or is too long; the question is not kept.
        """
        self.fit_videos(text)
        question = _message("user", text, self.waiting)
        images = self.images + self.waiting
        messages = [*self.messages, question]
        inputs = self._encode(messages, [medium for _, medium in images])
        reply = _message("assistant", "")
        before = self.messages, self.images, self.waiting
        self.messages, self.images, self.waiting = asked = [*messages, reply], images, []
        try:
            for piece in self._stream(inputs):
                reply["content"][0]["text"] += piece
                yield piece
        except Exception:
            if self.messages is asked[0]:  # or another thread began anew meanwhile
                self.messages, self.images, self.waiting = before
            raise

    def stop(self) -> None:
        """End the reply that another thread is asking for; what was said is kept."""
        self._halt.event.set()

    def rewind(self, turn: int) -> str:
        """Take back a question and all that follows; its pictures wait for the next question.

        Args:
            turn: which question, counted from 0.

        Returns:
            the question's text.
        """
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        first = asked[turn]
        question = self.messages[first]["content"]
        kept = sum(_num_shown(message) for message in self.messages[:first])
        of_question = _num_shown(self.messages[first])
        self.messages = self.messages[:first]
        self.waiting, self.images = self.images[kept : kept + of_question], self.images[:kept]
        return question[-1]["text"]

    def _limit(self) -> int | None:
        """Return the longest sequence the language model knows, None where it has no limit."""
        return context_length(self.model.config.text_config)

    def _encode(self, messages: list, media: list[Medium]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for the conversation, on its device."""
        limit = self._limit()
        encoded = self.processor.encode(
            messages,
            [medium for medium in media if not isinstance(medium, SampledVideo)],
            videos=[medium for medium in media if isinstance(medium, SampledVideo)],
            add_generation_prompt=True,
            max_length=None if limit is None else limit - 1,
        )
        batch = self.processor.collate([encoded], padding_side="left")
        return {name: value.to(self.model.device) for name, value in batch.items()}

    def _stream(self, inputs: Mapping[str, torch.Tensor]) -> Generator[str]:
        """Generate in a thread and yield text as it comes; stop the thread when closed."""
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        stop, failures = _Stop(), []
        self._halt = stop
        new_tokens, limit = self.sampling.max_new_tokens, self._limit()
        if limit is not None:
            new_tokens = min(new_tokens, limit - inputs["input_ids"].shape[1])

        in_one_piece = self.sampling.num_beams > 1  # beams are chosen at the end

        def generate() -> None:
            try:
                ids = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                    **inputs,
                    **self.sampling.generate_options(),
                    max_new_tokens=new_tokens,
                    streamer=None if in_one_piece else streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
                if in_one_piece:
                    reply = ids[0, inputs["input_ids"].shape[1] :]
                    text = self.processor.tokenizer.decode(reply, skip_special_tokens=True)
                    streamer.on_finalized_text(text, stream_end=True)
            except BaseException as error:
                failures.append(error)  # raised again below, in the thread that asked
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.event.set()
            thread.join()
        if failures:
            raise failures[0]

    def to_record(self, name: str) -> dict[str, Any]:
        """Return the conversation as a record in LLaVA's form, with its files' names."""
        speakers = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [
            {"from": speakers[message["role"]], "value": _with_placeholders(message)}
            for message in self.messages
        ]
        record: dict[str, Any] = {"id": name}
        for key, is_video in (("image", False), ("video", True)):
            names = [name for name, m in self.images if isinstance(m, SampledVideo) == is_video]
            if names:
                record[key] = names[0] if len(names) == 1 else names
        return record | {"conversations": turns}

    def save(self, path: str | Path) -> None:
        """Write the conversation as a LLaVA-format JSON file, one record.

        Raises:
            UserError: the file cannot be written.
        """
        record = self.to_record(Path(path).stem)
        text = json.dumps([record], indent=2, ensure_ascii=False) + "\n"
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error


def _message(role: str, text: str, media: Sequence[tuple[str, Medium]] = ()) -> dict[str, Any]:
    """Return one message: pictures and videos first, then the text."""
    kinds = ["video" if isinstance(medium, SampledVideo) else "image" for _, medium in media]
    return {
        "role": role,
        "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}],
    }


def _thinned(medium: Medium, most_frames: int) -> Medium:
    """Return a picture, or a video with at most so many of its frames."""
    return thin(medium, most_frames) if isinstance(medium, SampledVideo) else medium


def _num_shown(message: Mapping[str, Any]) -> int:
    """Return how many pictures and videos a message shows."""
    return sum(entry["type"] != "text" for entry in message["content"])


def _with_placeholders(message: Mapping[str, Any]) -> str:
    """Return a message as LLaVA's files have it: `<image>` and a newline per picture, the text."""
    return "".join(
        entry["text"] if entry["type"] == "text" else f"<{entry['type']}>\n"
        for entry in message["content"]
    )
