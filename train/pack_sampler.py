"""Which packed rows does an epoch have? On every rank and in every epoch as many.

What an epoch is made of follows from the seed, the epoch and the exact lengths, never from ranks or
workers, so a run that is resumed goes on with the rows it would have had.

The Trainer counts on epochs of equal length. The rows of two epochs differ by a few, so the epoch
with the most decides, and the others take some of their rows apart in two.
"""

from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np
from torch.utils.data import Sampler

from train.packing import Pack, Packing, best_fit, take_apart
from train.steps import StepSizes


class PackSampler(Sampler[Pack]):
    """Yields packs of positions, epoch by epoch; behind an epoch's last, empty ones.

    The empty ones make the last micro-step full on all ranks, in place of records seen twice.

    Args:
        size: records of an epoch.
        num_tokens: (start, stop) -> lengths of the rows at these positions.
        packing: how rows are filled.
        seed: of the shuffling of rows.
        sizes: packs of an epoch -> how the Trainer takes them.
        total_steps: optimizer steps of the stage, by `sizes`.
        wanted: packs that the stage asks for altogether; None: whole epochs. Where the first epoch
            has more of them the rest of it is never planned and its packs are estimated.
    """

    def __init__(
        self,
        size: int,
        num_tokens: Callable[[int, int], np.ndarray],
        packing: Packing,
        seed: int,
        sizes: Callable[[int], StepSizes],
        total_steps: Callable[[StepSizes], int],
        wanted: int | None = None,
    ) -> None:
        self.size = size
        self.num_tokens = num_tokens
        self.packing = packing
        self.seed = seed
        self.epoch = 0
        self.whole = True
        self.fill = 0.0  # share of the rows' room that tokens take, in what was planned of epoch 0
        self.packs = self._packs_of_an_epoch(sizes, total_steps, wanted)
        plan = sizes(self.packs)
        self.empty = max(0, plan.batches * plan.micro_batch - self.packs)

    def _packs_of_an_epoch(
        self,
        sizes: Callable[[int], StepSizes],
        total_steps: Callable[[StepSizes], int],
        wanted: int | None,
    ) -> int:
        """Return the most packs of any epoch that the stage begins."""
        seen = packs = tokens = 0
        for found, lengths in self._windows(0):
            seen, packs = seen + len(lengths), packs + len(found)
            tokens += int(lengths.sum())
            self.fill = tokens / (packs * self.packing.length)
            if wanted is not None and packs >= wanted and seen < self.size:
                self.whole = False
                return -(-packs * self.size // seen)
        epoch, most = 1, packs
        while epoch * sizes(most).steps < total_steps(sizes(most)):
            most = max(most, sum(len(found) for found, _ in self._windows(epoch)))
            epoch += 1
        return most

    def set_epoch(self, epoch: int) -> None:
        """Go on with `epoch`; the Trainer says so when it starts or resumes one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.packs + self.empty

    def __iter__(self) -> Iterator[Pack]:
        return self.epoch_packs(self.epoch)

    def epoch_packs(self, epoch: int) -> Iterator[Pack]:
        """Yield the packs of an epoch in order."""
        packs = chain.from_iterable(found for found, _ in self._windows(epoch))
        if not self.whole:
            yield from packs
            return
        yield from take_apart(list(packs), self.packs)
        yield from [()] * self.empty

    def taken(self, epoch: int, count: int) -> np.ndarray:
        """Return the positions in the first `count` packs of an epoch."""
        packs = islice(self.epoch_packs(epoch), count)
        return np.fromiter(chain.from_iterable(packs), dtype=np.int64)

    def _windows(self, epoch: int) -> Iterator[tuple[list[Pack], np.ndarray]]:
        """Yield each window's packs, and the lengths of its records."""
        first, last = epoch * self.size, (epoch + 1) * self.size
        for start in range(first, last, self.packing.window):
            stop = min(start + self.packing.window, last)
            lengths = self.num_tokens(start, stop)
            rows = best_fit(lengths, self.packing.length)
            order = np.random.default_rng([self.seed, start]).permutation(len(rows)).tolist()
            # within a row the records keep the mixture's order
            packs = [tuple(start + record for record in sorted(rows[row])) for row in order]
            yield packs, lengths
