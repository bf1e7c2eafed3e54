"""In which order are the mixture's positions asked for? Rows of like length together.

The mixture decides which records an optimizer step sees. Within a window of whole steps the order
is free: sorted by length, micro-batches are padded less. In a window of one step the step's
records, and so its gradient, are those of the unsorted order; only the rounding differs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


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
            lengths = [self.num_tokens(p) for p in range(start, min(start + self.window, last))]
            rng = np.random.default_rng([self.seed, start])
            for offset in like_lengths_together(lengths, self.micro_batch, rng):
                yield start + offset
