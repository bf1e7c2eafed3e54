"""In which order are the mixture's positions asked for? Its own, by length, or packed.

The mixture decides which records an optimizer step sees. Within a window of whole steps the order
is free: sorted by length, micro-batches are padded less. In a window of one step the step's
records, and so its gradient, are those of the unsorted order; only the rounding differs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainingArguments

from data_recipes.dataset import ConversationDataset
from data_recipes.lengths import RecordLengths
from train.pack_sampler import PackSampler
from train.packing import Packing
from train.process import is_main_process
from train.steps import loaded_ahead, step_sizes, total_steps


def like_lengths_together(
    lengths: Sequence[int], micro_batch: int, rng: np.random.Generator
) -> list[int]:
    """Return the order of a window's rows: micro-batches of like length, themselves shuffled.

    Args:
        lengths: tokens of each row of the window.
        micro_batch: rows that are padded together, on all ranks: neighbours in length stay on the
            same micro-step, so ranks wait less for each other.
        rng: shuffles whole micro-batches, so that lengths do not rise within a window; a last one
            that is not full stays last.
    """
    by_length = np.argsort(lengths, kind="stable")
    full = len(by_length) // micro_batch * micro_batch
    batches = rng.permutation(by_length[:full].reshape(-1, micro_batch))
    return [*batches.ravel().tolist(), *by_length[full:].tolist()]


class PositionSampler(Sampler[int]):
    """Yields positions of the mixture, epoch by epoch.

    Args:
        size: records of an epoch.
        num_tokens: length of the row at a position.
        window: records within which the order is free; 0 keeps the mixture's own.
        micro_batch: rows that are padded together, over all ranks.
        seed: of the shuffling of micro-batches.
    """

    def __init__(
        self,
        size: int,
        num_tokens: Callable[[int], int],
        window: int = 0,
        micro_batch: int = 1,
        seed: int = 0,
    ) -> None:
        self.size = size
        self.num_tokens = num_tokens
        self.window = window
        self.micro_batch = micro_batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go on with `epoch`; the Trainer says so when it starts or resumes one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        first, last = self.epoch * self.size, (self.epoch + 1) * self.size
        if not self.window:
            yield from range(first, last)
            return
        for start in range(first, last, self.window):
            yield from self._sorted(start, min(start + self.window, last))

    def _sorted(self, start: int, stop: int) -> list[int]:
        """Return the positions of a window in order."""
        lengths = [self.num_tokens(position) for position in range(start, stop)]
        rng = np.random.default_rng([self.seed, start])
        return [start + n for n in like_lengths_together(lengths, self.micro_batch, rng)]

    def taken(self, epoch: int, count: int) -> np.ndarray:
        """Return the first `count` positions of an epoch, in any order."""
        first, last = epoch * self.size, (epoch + 1) * self.size
        stop = min(first + count, last)
        if not self.window or stop == last:
            return np.arange(first, stop)
        whole = first + (stop - first) // self.window * self.window
        part = self._sorted(whole, min(whole + self.window, last)) if stop > whole else []
        return np.concatenate([np.arange(first, whole), part[: stop - whole]]).astype(np.int64)


Order = PositionSampler | PackSampler


def make_order(
    dataset: ConversationDataset,
    arguments: TrainingArguments,
    length_window: int = 0,
    packing: Packing | None = None,
) -> Order:
    """Return the order in which a stage asks for records.

    Args:
        dataset: its records.
        arguments: of its Trainer.
        length_window: optimizer steps within which rows of like length come together; 0: none.
        packing: how rows are filled with several records; None: each has its own.
    """
    micro_batch = arguments.train_batch_size * arguments.world_size
    if packing is None:
        window = length_window * micro_batch * arguments.gradient_accumulation_steps
        return PositionSampler(
            len(dataset), dataset.num_tokens, window, micro_batch, arguments.seed
        )
    wanted = None
    if arguments.max_steps > 0:
        batches = arguments.max_steps * arguments.gradient_accumulation_steps
        wanted = (batches + loaded_ahead(arguments)) * micro_batch
    # One process of each machine counts tokens, the others read what it has written.
    with arguments.main_process_first(desc="counting tokens"):
        lengths = RecordLengths(dataset, arguments.dataloader_num_workers, is_main_process())
        order = PackSampler(
            len(dataset),
            lengths,
            packing,
            arguments.seed,
            partial(step_sizes, arguments),
            partial(total_steps, arguments),
            wanted,
        )
        lengths.save()
    return order


def seen_spans(
    order: Order, arguments: TrainingArguments, steps: int, ahead: int = 0
) -> list[tuple[int, int]]:
    """Return, as spans [start, stop), the positions of the mixture that so many steps see.

    Args:
        order: of the stage.
        arguments: of its Trainer.
        steps: optimizer steps from the stage's start.
        ahead: micro-batches that the loader asks for before they are needed.
    """
    spans = []
    for epoch, count in enumerate(step_sizes(arguments, len(order)).seen(steps, ahead)):
        positions = np.sort(order.taken(epoch, count))
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        runs = np.split(positions, breaks) if len(positions) else []
        spans += [(int(run[0]), int(run[-1]) + 1) for run in runs]
    return spans
