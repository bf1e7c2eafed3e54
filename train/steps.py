"""How many records, or rows of packed ones, has a stage seen by its step n?"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class StepSizes:
    """How many items the Trainer takes at once: records, or packs of records that share a row.

    Attributes:
        epoch: items of an epoch.
        micro_batch: items of one micro-step, over all ranks.
        accumulation: micro-steps of an optimizer step.
        drop_last: whether an epoch's last micro-batch is left out where it is not full.
    """

    epoch: int
    micro_batch: int
    accumulation: int
    drop_last: bool

    @property
    def batches(self) -> int:
        """Micro-batches of an epoch."""
        if self.drop_last:
            return self.epoch // self.micro_batch
        return math.ceil(self.epoch / self.micro_batch)

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return max(1, math.ceil(self.batches / self.accumulation))

    def total(self, epochs: float, max_steps: int) -> int:
        """Return the optimizer steps of a stage; `max_steps` above 0 decides."""
        return max_steps if max_steps > 0 else math.ceil(epochs * self.steps)

    def seen(self, steps: int, ahead: int = 0) -> list[int]:
        """Return how many items so many steps see of each epoch.

        Args:
            steps: optimizer steps from the stage's start.
            ahead: micro-batches that the loader asks for before they are needed, within an epoch.
        """
        found = []
        while steps > 0:
            batches = min(self.batches, steps * self.accumulation + ahead)
            found.append(min(self.epoch, batches * self.micro_batch))
            steps -= self.steps
        return found


def step_sizes(arguments: "TrainingArguments", items: int) -> StepSizes:
    """Return how a stage with so many items an epoch is cut into steps."""
    return StepSizes(
        epoch=items,
        micro_batch=arguments.train_batch_size * arguments.world_size,
        accumulation=arguments.gradient_accumulation_steps,
        drop_last=arguments.dataloader_drop_last,
    )


def check_batches(sizes: StepSizes, stage: str) -> None:
    """Refuse a stage none of whose micro-batches is full, where only full ones are taken.

    Raises:
        UserError: with both numbers.
    """
    if sizes.batches == 0:
        raise UserError(
            f"stages.{stage}.training: dataloader_drop_last leaves no batch of {sizes.micro_batch} "
            f"where an epoch has {sizes.epoch}; leave it out, or take smaller batches"
        )


def total_steps(arguments: "TrainingArguments", sizes: StepSizes) -> int:
    """Return the optimizer steps of a stage, as the Trainer counts them."""
    return sizes.total(arguments.num_train_epochs, arguments.max_steps)


def loaded_ahead(arguments: "TrainingArguments") -> int:
    """Return how many micro-batches the loader asks for beyond the one in use.

    accelerate holds one back to know the last one; torch's workers prepare some each (2 by its own
    default).
    """
    each = arguments.dataloader_prefetch_factor or 2
    return 1 + arguments.dataloader_num_workers * each
