"""How well does a stage do on records that it does not learn from? Their loss, every n steps.

It is the mean over their supervised tokens, of all processes. It draws no random number, takes the
records in one order and leaves no trace in the training: losses and weights are those without it.
"""

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments

from data_recipes.dataset import IGNORED, ConversationDataset
from train.trainer import VlmTrainer


def batches_of_rank(size: int, batch: int, rank: int, world: int) -> list[tuple[list[int], bool]]:
    """Return (positions, whether they count) of each of a process's batches.

    All processes have as many, because sharded models run together: where there are too few, the
    last one comes again and does not count.

    Args:
        size: records.
        batch: records at once.
        rank: which process.
        world: of how many.
    """
    batches = [list(range(at, min(at + batch, size))) for at in range(0, size, batch)]
    rounds = math.ceil(len(batches) / world)
    own = [number * world + rank for number in range(rounds)]
    return [(batches[min(n, len(batches) - 1)], n < len(batches)) for n in own]


class Validation(TrainerCallback):
    """Measures every n steps and at the last one, and adds the loss to the log's line.

    Args:
        trainer: its model is measured, in its precision.
        dataset: the records; each is seen once.
        collate: makes batches of its items.
        every: optimizer steps.
    """

    def __init__(
        self,
        trainer: VlmTrainer,
        dataset: ConversationDataset,
        collate: Callable[..., dict[str, Any]],
        every: int,
    ) -> None:
        self.trainer = trainer
        self.every = every
        args = trainer.args
        share = batches_of_rank(
            len(dataset), args.eval_batch_size, args.process_index, args.world_size
        )
        self.counts = [counts for _, counts in share]
        self.loader = DataLoader(
            dataset,
            batch_sampler=[positions for positions, _ in share],
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # of its own: the global one is the training's
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        start = time.perf_counter()
        self.trainer.beside_loss["validation_loss"] = self.measure()
        self.trainer.window.leave_out(time.perf_counter() - start)
        control.should_log = True

    @torch.no_grad()
    def measure(self) -> float:
        """Return the mean loss of a supervised token."""
        model = cast(nn.Module, self.trainer.model)
        model.eval()  # a training step sets it back
        total = torch.zeros(2, dtype=torch.float64, device=self.trainer.args.device)
        for batch, counts in zip(self.loader, self.counts, strict=True):
            summed = self._sum(model, batch)
            if counts:
                total += summed
        total = cast(Tensor, self.trainer.accelerator.reduce(total, "sum"))
        return (total[0] / total[1].clamp(min=1)).item()

    def _sum(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return (2,): the summed loss of a batch, and how many tokens it is of."""
        known = ("skipped", "record_ids")
        inputs = self.trainer._prepare_inputs({k: v for k, v in batch.items() if k not in known})
        with self.trainer.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1).loss
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        return torch.stack([loss.double(), tokens.double()])
