"""How do a task's questions get their answers? Windows, batches, one row per answer.

Questions are read in file order in windows of a few batches, sorted by length inside the window
(pictures count with their tokens) and answered batch by batch. The batches depend on the questions
alone, not on what is answered already: a resumed run forms the same batches as an uninterrupted
one, bit for bit, and only leaves out those that are complete. (After a change of the limit it asks
some questions again, and keeps their first answers.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

from PIL import Image

from eval.answering import Answer, Question
from eval.protocols import Protocol
from eval.samples import Row, SampleStore
from eval.task import Example, Task, told_with
from vlm.answers import LETTERS
from vlm.video import VideoSource

IMAGE, BLIND = "image", "blind"
WINDOW_BATCHES = 8  # more sorts better and holds more decoded pictures in memory


class Answerer(Interface):
    """Whatever answers questions; the model's is `eval.answering.ModelAnswerer`."""

    def encode(
        self,
        messages: list[dict[str, Any]],
        media: list[Image.Image | VideoSource],
        choices: tuple[str, ...],
    ) -> Question:
        """Return a question ready for batching."""
        ...

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Which questions are asked how: wording, rows, views and batch size."""

    protocol: Protocol
    indices: tuple[int, ...]
    views: tuple[str, ...] = (IMAGE, BLIND)
    batch_size: int = 64

    @property
    def num_answers(self) -> int:
        """How many answers a whole run has."""
        return len(self.indices) * len(self.views)


def choose_indices(task: Task, limit: int | None) -> tuple[int, ...]:
    """Return the questions to ask, in file order; a limit takes evenly from every group.

    The questions are lined up group by group (type, task, source) and every k-th is taken, so a
    small limit still holds all tasks in the proportions of the file.
    """
    total = task.num_examples
    if limit is None or limit >= total:
        return tuple(range(total))
    by_group = sorted(range(total), key=lambda i: (sorted(task.get_example(i).groups.items()), i))
    return tuple(sorted(by_group[(2 * k + 1) * total // (2 * limit)] for k in range(limit)))


def answer_all(
    task: Task,
    answerer: Answerer,
    store: SampleStore,
    plan: RunPlan,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Answer every question of the plan that the store does not hold yet.

    Args:
        task: where questions and pictures come from.
        answerer: who answers.
        store: where answers go, flushed after every batch.
        plan: what to ask.
        on_progress: called with the number of new answers after every batch.
    """
    for view in plan.views:
        for batch in _batches(task, answerer, store, plan, view):
            answers = answerer.answer([question for _, question in batch])
            rows = [
                _row(task, plan.protocol, example, view, answer)
                for (example, _), answer in zip(batch, answers, strict=True)
                if (example.index, view) not in store.rows
            ]
            store.append(rows)
            on_progress(len(rows))


def _batches(
    task: Task, answerer: Answerer, store: SampleStore, plan: RunPlan, view: str
) -> Iterator[list[tuple[Example, Question]]]:
    """Yield the batches in which at least one answer is missing."""
    size = plan.batch_size * WINDOW_BATCHES
    for start in range(0, len(plan.indices), size):
        window = plan.indices[start : start + size]
        if all((index, view) in store.rows for index in window):
            continue
        encoded: list[tuple[Example, Question]] = []
        for index in window:
            example = task.get_example(index)
            blind = view == BLIND
            messages = task.prompt(example, plan.protocol, blind=blind)
            media = [] if blind else task.media(index)
            with told_with(task.where(index)):  # videos are decoded here
                encoded.append((example, answerer.encode(messages, media, example.choices)))
        encoded.sort(key=lambda pair: (pair[1].length, pair[0].index))
        for first in range(0, len(encoded), plan.batch_size):
            batch = encoded[first : first + plan.batch_size]
            if any((example.index, view) not in store.rows for example, _ in batch):
                yield batch


def _row(task: Task, protocol: Protocol, example: Example, view: str, answer: Answer) -> Row:
    """Return what is kept of one answer: enough to read, score and compare it without the data."""
    scores = answer.log_likelihoods
    # Forced choice: the likeliest letter; of equal ones the first, as the model leaves no order.
    likeliest = None if scores is None else LETTERS[scores.index(max(scores))]
    return {
        "index": example.index,
        "view": view,
        "groups": dict(example.groups),
        "prompt": protocol.wrap(example.prompt),
        "choices": list(example.choices),
        "answer": example.answer,
        "reply": answer.reply,
        "finished": answer.finished,
        "generation": None if answer.reading is None else answer.reading.letter,
        "rule": None if answer.reading is None else answer.reading.rule,
        "likelihood": likeliest,
        "log_likelihoods": None if scores is None else [round(score, 6) for score in scores],
    }
