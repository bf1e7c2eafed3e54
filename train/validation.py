"""How well does a stage do on records that it does not learn from? Their loss, every n steps.

It is the mean over their supervised tokens, of all processes. It draws no random number, takes the
records in one order and leaves no trace in the training: losses and weights are those without it.
What text and headers tell of records that cannot be used is told before the training begins.
"""

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments

from data_recipes.dataset import IGNORED, ConversationDataset, Skipped
from data_recipes.lengths import RecordLengths
from train.process import say
from train.trainer import VlmTrainer
from vlm.errors import UserError


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


def check_records(dataset: ConversationDataset, strict: bool, workers: int) -> None:
    """Look at all records as far as it goes without decoding a picture.

    Args:
        dataset: the held-out records; those that cannot be used are left out.
        strict: there must be no such record.
        workers: processes that count tokens not counted before.

    Raises:
        UserError: there is one, too long ones included; or all are so.
    """
    lengths = RecordLengths(dataset, workers, progress=True)
    counts = lengths(0, len(dataset))
    lengths.save()
    most = dataset.max_length or counts.max()
    unusable = ((counts == 0) | (counts > most)).nonzero()[0].tolist()
    first = dataset[unusable[0]] if unusable else None
    if not isinstance(first, Skipped):
        return
    if strict:
        raise UserError(f"validation: {first.reason}")
    if len(unusable) == len(dataset):
        raise UserError(f"validation: no record can be used; the first: {first.reason}")


class Validation(TrainerCallback):
    """Measures every n steps and at the last one, and adds the loss to the log's line.

    A record that turns out to be unusable stops the stage, if it must not be left out, once the
    step is saved; all processes have then measured all batches, as sharded models have to.

    Args:
        trainer: its model is measured, in its precision.
        dataset: the records; each is seen once, and those that cannot be used are left out.
        collate: makes batches of its items.
        every: optimizer steps.
        strict: whether no record may be left out.

    Raises:
        UserError: see `check_records`.
    """

    def __init__(
        self,
        trainer: VlmTrainer,
        dataset: ConversationDataset,
        collate: Callable[..., dict[str, Any]],
        every: int,
        strict: bool,
    ) -> None:
        self.trainer = trainer
        self.every = every
        self.strict = strict
        self.told = False
        self.fault: UserError | None = None
        args = trainer.args
        check_records(dataset, strict, args.dataloader_num_workers)
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
        try:
            self.trainer.beside_loss["validation_loss"] = self.measure()
        except UserError as error:
            self.fault, control.should_save = error, True
        self.trainer.window.leave_out(time.perf_counter() - start)
        control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop a stage whose records cannot be measured.

        Raises:
            UserError: the fault, which all processes know of.
        """
        if self.fault is not None:
            raise self.fault

    @torch.no_grad()
    def measure(self) -> float:
        """Return the mean loss of a supervised token; records left out are told once.

        Raises:
            UserError: no record can be used, or one cannot that must.
        """
        model = cast(nn.Module, self.trainer.model)
        model.eval()  # a training step sets it back
        total = torch.zeros(3, dtype=torch.float64, device=self.trainer.args.device)
        skipped: list[Skipped] = []
        for batch, counts in zip(self.loader, self.counts, strict=True):
            summed = self._sum(model, batch)
            if counts:
                total += summed
                skipped += batch["skipped"]
        total = cast(Tensor, self.trainer.accelerator.reduce(total, "sum"))
        loss, tokens, lost = total.tolist()
        if lost and self.strict:
            told = skipped[0].reason if skipped else "a record of another process cannot be used"
            raise UserError(f"validation: {told}; mend it, and the same command goes on")
        if not tokens:
            raise UserError("validation: no record can be used; `vlm data check` tells why")
        if lost and not self.told:
            reason = f", such as {skipped[0].reason}" if skipped else ""
            say(f"validation: {lost:.0f} record(s) cannot be used and are left out{reason}")
            self.told = True
        return loss / tokens

    def _sum(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return (3,): a batch's summed loss, its supervised tokens, and the records it lacks."""
        known = ("skipped", "record_ids")
        inputs = self.trainer._prepare_inputs({k: v for k, v in batch.items() if k not in known})
        with self.trainer.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1).loss
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        lost = tokens.new_tensor(len(batch["skipped"]))
        return torch.stack([loss.double(), tokens.double(), lost.double()])
