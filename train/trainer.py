"""What does our Trainer do differently? Groups, order, bookkeeping, checkpoints; not the loop.

The loss is the model's own sum over supervised tokens, divided by `num_items_in_batch`: the count
of supervised tokens over accumulation steps and ranks, which the Trainer gathers for models whose
forward accepts it.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from data_recipes.dataset import ConversationDataset, Skipped
from train.averages import WeightAverage
from train.callbacks import KeepAverage
from train.checkpoints import PREFIX, RECIPE, full_disk_told, prune, seal
from train.engine import Engine, check_engine, set_up_fsdp
from train.freeze import Group, optimizer_groups
from train.measures import Window
from train.mfu import Meter
from train.order import Order, make_order
from train.packing import Packing
from train.phases import PhaseSwitch, follow_phases
from train.process import say
from train.sharded_state import save_fsdp_states, settled
from train.spikes import SpikeGuard
from train.zero_states import load_states, state_files
from vlm.errors import UserError

NOTHING = 10  # steps without anything to learn, at the start, that stop a stage


class SealingTrainer(Trainer):
    """A Trainer whose checkpoints are whole or recognised as torn."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, then seal it, and only then delete the oldest ones.

        Raises:
            UserError: the disk is full; the checkpoints before this one are untouched.
        """
        folder = Path(cast(str, self.args.output_dir))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with full_disk_told(f"the checkpoint of step {self.state.global_step}", folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # every rank's random state is written
                if self.args.should_save:
                    checkpoint = folder / f"{PREFIX}{self.state.global_step}"
                    self._save_more(checkpoint)
                    seal(checkpoint)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            prune(folder, limit)

    def _save_more(self, checkpoint: Path) -> None:
        """Write what a subclass keeps beside what the Trainer does; asked of the main process."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write model and processor; not the pickle of the arguments that the Trainer adds."""
        super()._save(output_dir, settled(state_dict))
        folder = Path(output_dir or cast(str, self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write their states; sharded ones as if they were whole."""
        if self.is_fsdp_enabled:
            save_fsdp_states(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)


class VlmTrainer(SealingTrainer):
    """A Trainer that knows parts, mixtures and skipped records.

    Args:
        dataset: what to train on; it decides the order.
        groups: from `train.freeze.freeze`.
        on_skip: called with every record that was left out of a batch of this rank.
        on_engine: called with what runs the stage.
        length_window: optimizer steps within which rows of like length come together; 0: none.
        packing: how rows are filled with several records; None: each has its own.
        starts: steps done when each of the groups' phases begins, the first 0.
        ema_decay: of the weights' average; None: none is kept.
        max_spike: a step whose loss is above so many times the median of those before it stops the
            run; None: no step does.
        meter: counts what batches cost.

    Attributes:
        average: of the weights, on the main process alone.
        beside_loss: what else the log's next line tells.
    """

    def __init__(
        self,
        *,
        dataset: ConversationDataset,
        groups: list[Group],
        on_skip: Any,
        on_engine: Callable[[Engine], None],
        length_window: int = 0,
        packing: Packing | None = None,
        starts: Sequence[int] = (0,),
        ema_decay: float | None = None,
        max_spike: float | None = None,
        meter: Meter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=dataset, **kwargs)
        self.dataset = dataset
        self.groups = groups
        self.on_skip = on_skip
        self.on_engine = on_engine
        self.starts = starts
        self.average: WeightAverage | None = None
        if ema_decay is not None and self.args.should_save:
            self.average = WeightAverage(cast(nn.Module, self.model), ema_decay)
            self.add_callback(KeepAverage(self.average))
        if len(starts) > 1:
            self.add_callback(PhaseSwitch(groups, starts, self.args.weight_decay))
        self.spikes = None if max_spike is None else SpikeGuard(max_spike)
        self.step_loss, self.step_records = 0.0, list[str]()
        self.meter = meter or Meter(None)
        self.window = Window(peak=self.meter.peak)
        self.sampler = make_order(dataset, self.args, length_window, packing)
        self.beside_loss: dict[str, float] = {}
        self.idle_steps: int | None = 0  # from the first on; None: one had something to learn

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, which shards on CPUs, too, and adds up in float32."""
        super().create_accelerator_and_postprocess()
        set_up_fsdp(self)

    def _prepare_for_training(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        """Wrap the model and load the checkpoint's state, then see what runs it."""
        checkpoint = Path(resume_from_checkpoint or "")
        wrote = len(state_files(checkpoint)) if resume_from_checkpoint else 0
        others = wrote not in (0, self.args.world_size)  # wrote what DeepSpeed refuses to read
        own = None if others else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, own)
        if others:
            load_states(self.model_wrapped, checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # the schedule is left
        self.on_engine(check_engine(self))
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over the freeze plan's groups."""
        if self.optimizer is None:
            model = model or self.model
            assert isinstance(model, nn.Module)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model))
            groups = optimizer_groups(model, self.groups, self.args.weight_decay)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule, whose peaks are those of the phase."""
        is_new = self.lr_scheduler is None
        warmup = self.args.get_warmup_steps(num_training_steps)
        if is_new and warmup >= num_training_steps:
            told = f"warming up takes {warmup} steps and there are {num_training_steps}"
            say(f"{told}: no learning rate reaches what the recipe says")
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and len(self.starts) > 1:
            follow_phases(cast(LambdaLR, scheduler), self.groups, self.starts)
        return scheduler

    def _save_more(self, checkpoint: Path) -> None:
        recipe = Path(cast(str, self.args.output_dir)).parent / RECIPE
        if recipe.exists():  # not where the Trainer runs without a recipe, as a benchmark's does
            shutil.copy(recipe, checkpoint)
        if self.average is not None:
            self.average.save(checkpoint)
        if self.spikes is not None:
            self.spikes.save(checkpoint)

    def load_more(self, checkpoint: Path) -> None:
        """Go on with what was kept in a checkpoint beside what the Trainer keeps."""
        if self.average is not None:
            self.average.load(checkpoint)
        if self.spikes is not None:
            self.spikes.load(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        """Give the loader a generator of its own.

        Each new iterator draws a seed for its workers; a resumed run makes one iterator more, and
        drawn from the global generator that would change every dropout mask after it.
        """
        loader = cast(Any, super().get_train_dataloader())  # accelerate's, around torch's
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.sampler

    def _run_epoch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, epoch: int, **kwargs: Any
    ) -> None:
        """Tell the order its epoch: accelerate does not where ranks go on within one."""
        self.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Return what the whole step's loss is divided by: its supervised tokens, or their weights.

        At least 1, for a step of skipped records.

        Raises:
            UserError: none of the first steps has anything to learn.
        """
        count = super()._get_num_items_in_batch(batch_samples, device)
        assert isinstance(count, Tensor), "the model must take num_items_in_batch"
        self.window.tokens += count
        self._check_learns(bool(count))
        if "loss_weights" in batch_samples[0]:
            weights = torch.stack([batch["loss_weights"].sum() for batch in batch_samples])
            count = self._over_processes(weights.sum().to(device))
        return count.clamp(min=1)

    def _check_learns(self, learns: bool) -> None:
        """Stop a stage whose first steps, on all processes, had nothing to learn: all is skipped.

        Raises:
            UserError: there were NOTHING of them, or as many as the stage has.
        """
        if self.idle_steps is None or learns:
            self.idle_steps = None
            return
        self.idle_steps += 1
        if self.idle_steps == min(NOTHING, self.state.max_steps):
            raise UserError(
                f"none of the first {self.idle_steps} steps has a record to learn from: all were "
                "skipped, see skipped.0.jsonl in the stage's folder, or have no words to learn"
            )

    def _over_processes(self, counts: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return cast(Tensor, self.accelerator.reduce(counts, "sum"))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Take a step's micro-batches, and count the time that the loader takes."""
        return super().get_batch_samples(self.window.timed(epoch_iterator), num_batches, device)

    def final_figures(self) -> dict[str, Any]:
        """Return what to note in the manifest when the stage ends; asked of the main process."""
        return {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch; stop at a loss that is no number, before it reaches the weights.

        Raises:
            UserError: the loss is NaN or infinite, or jumped; names the step and the records.
        """
        skipped: list[Skipped] = inputs.pop("skipped")
        record_ids: list[str] = inputs.pop("record_ids")
        for skip in skipped:
            self.on_skip(skip)
        if record_ids:
            inputs["record_ids"] = record_ids
        self.window.add_rows(inputs)
        self.window.flops += self.meter.of(inputs, self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.window.samples += len(record_ids) * self.args.world_size
        value = loss.item()
        if not math.isfinite(value):
            raise self._stop(f"became {value}", record_ids, "")
        self.step_loss += value
        self.step_records += record_ids
        if self.accelerator.sync_gradients:
            if self.spikes is not None and self.spikes.is_spike(self.step_loss):
                jump = (
                    f"jumped to {self.step_loss:.4g}, from a median of {self.spikes.median():.4g}"
                )
                raise self._stop(jump, self.step_records, ", or raise the stage's max_spike")
            self.step_loss, self.step_records = 0.0, []
        return loss

    def _stop(self, what: str, record_ids: Sequence[str], more: str) -> UserError:
        """Return the error for a loss that must not reach the weights."""
        return UserError(
            f"the loss {what} at step {self.state.global_step + 1}, in the batch of records "
            f"{', '.join(record_ids)}; nothing was written since the last checkpoint: look at "
            f"these records, or start again with a lower learning rate{more}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each part's learning rate and the rates since the last line."""
        if "loss" in logs:
            del logs["learning_rate"]
            for group in self.optimizer.param_groups:
                name = f"learning_rate/{group['part']}"  # of its layers the highest
                logs[name] = max(float(group["lr"]), logs.get(name, 0.0))
            logs.update(self.beside_loss | self.window.rates())
            self.window, self.beside_loss = Window(peak=self.meter.peak), {}
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the model was already built from the checkpoint.

        The Trainer's own way loads with strict=False, so that renamed keys go unnoticed.
        """
