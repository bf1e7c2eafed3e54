"""What must a benchmark task offer so that the harness can ask, score and sum it up?

A task is four things: how many examples, one example, its prompt under a protocol, and whether a
letter is right. Composite scores are declared as `Formula`, data that says its own name and
arithmetic, so that no number appears in a report without the formula it came from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from eval.protocols import Protocol
from vlm.errors import UserError
from vlm.video import VideoSource


@dataclass(frozen=True, kw_only=True)
class Example:
    """One multiple-choice question, without its picture.

    `groups` maps the name of a breakdown ("task", "source") to the group the question is in.
    """

    index: int  # place in the data, counted over all files
    prompt: str  # question and options, as the data set words them
    choices: tuple[str, ...]
    answer: str  # the right option's letter
    groups: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file a task read, as the manifest lists it."""

    path: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A composite score: the weighted mean of accuracies over the groups of one breakdown.

    `by` is None for the accuracy over all questions at once.
    """

    name: str
    text: str  # the arithmetic, as printed beside the number
    by: str | None = None
    weights: Mapping[str, float] | None = None


@contextmanager
def told_with(where: str) -> Iterator[None]:
    """Put before a fault's sentence where in the data it is.

    Raises:
        UserError: as it was raised, with its code and facts.
    """
    try:
        yield
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where}: {error}", error.code, **error.facts) from error


class Task(ABC):
    """A benchmark: questions with pictures, one right letter each."""

    name: ClassVar[str]
    summary: ClassVar[str]
    breakdowns: ClassVar[tuple[str, ...]]  # group names reported one table each, the first is main
    files: tuple[DataFile, ...]

    @classmethod
    @abstractmethod
    def open(cls, paths: Sequence[Path]) -> "Task":
        """Return the task on these data files.

        Raises:
            UserError: a file is missing, unreadable, or has not the task's columns.
        """

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Number of questions in all files."""

    @abstractmethod
    def get_example(self, index: int) -> Example:
        """Return one question."""

    @abstractmethod
    def images(self, index: int) -> list[Image.Image]:
        """Return the question's pictures, decoded. Fastest when asked in rising order.

        Raises:
            UserError: a picture cannot be decoded; the message names file and row.
        """

    def media(self, index: int) -> list[Image.Image | VideoSource]:
        """Return what is shown with a question: pictures, or videos that are not decoded yet.

        Which frames of a video are looked at is the model's affair; `images` may then be a strip.
        """
        return list(self.images(index))

    def where(self, index: int) -> str:
        """Return what errors call a question."""
        return f"question {index}"

    @abstractmethod
    def label(self, indices: Sequence[int]) -> str:
        """Return what these questions may be called: the benchmark's name, or why not."""

    @abstractmethod
    def formulas(self, examples: Sequence[Example]) -> list[Formula]:
        """Return the composite scores that these examples allow."""

    def prompt(self, example: Example, protocol: Protocol, *, blind: bool) -> list[dict[str, Any]]:
        """Return the messages to send: the picture, then the text; blind leaves the picture out."""
        text = {"type": "text", "text": protocol.wrap(example.prompt)}
        return [{"role": "user", "content": [text] if blind else [{"type": "image"}, text]}]

    def score(self, example: Example, letter: str | None) -> bool:
        """Say whether the letter is right; an unread reply is wrong."""
        return letter == example.answer
