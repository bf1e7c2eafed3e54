"""What do both base recipes share? Settings read from YAML, and one way to run and resume."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import Dataset

from connectors.config import config_from_mapping
from vlm.done import make_folder, read_done, write_note
from vlm.errors import UserError
from vlm.overrides import apply_overrides, parse_overrides
from vlm.yaml_values import read_file

REPORT = "report.json"
HELD_OUT = 1_000_000_000  # batches from here on are for measuring


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """How long and how fast a base model trains.

    Attributes:
        steps: optimizer steps.
        batch_size: examples of one step.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW.
        save_steps: a killed run loses at most this many steps.
        seed: decides weights and data.
        num_threads: CPU threads of torch; the two base models train side by side on two cores.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 50
    weight_decay: float = 0.02
    save_steps: int = 200
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be trained with."""
        least = {"steps": 1, "batch_size": 1, "save_steps": 1, "num_threads": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} must be {low} or more, not {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"learning_rate must be between 0 and 1, not {self.learning_rate}")


S = TypeVar("S", bound=BaseSettings)


def load_settings(cls: type[S], path: Path, overrides: Sequence[str]) -> S:
    """Read a base recipe and apply overrides such as `--steps 100`.

    Raises:
        UserError: the file or a field is wrong.
    """
    tree = read_file(path)
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping")
    apply_overrides(tree, parse_overrides(overrides))
    return config_from_mapping(cls, tree, f"recipe {path}")


def done_before(out: Path, settings: BaseSettings) -> dict[str, Any] | None:
    """Return the report of a finished run of the same settings; None, and the folder, if none.

    Raises:
        UserError: the folder holds a model of other settings.
    """
    report = read_done(out / REPORT, asdict(settings), "a base model")
    if report is None:
        make_folder(out)
    return report


def fit(model: nn.Module, data: Dataset, settings: BaseSettings, out: Path, title: str) -> float:
    """Train on `data`, whose items are whole batches, and return the seconds of this run.

    Goes on from the newest whole checkpoint in `out/checkpoints`; removes them when done.
    """
    import shutil

    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from train.callbacks import ProgressLine, StopCleanly
    from train.checkpoints import newest
    from train.process import name_accelerator
    from train.trainer import SealingTrainer

    name_accelerator()
    folder = out / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.98,
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=20,
        seed=settings.seed,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    started = time.perf_counter()
    with StopCleanly() as stop:
        trainer = SealingTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=first,  # pyright: ignore[reportArgumentType]
            callbacks=[ProgressLine(title), stop],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = newest(folder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        raise KeyboardInterrupt
    shutil.rmtree(folder, ignore_errors=True)
    return time.perf_counter() - started


def first(batches: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the only element: the data set yields whole batches."""
    (batch,) = batches
    return batch


def finish(out: Path, settings: BaseSettings, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Write the report, last of all files: it marks the folder as done."""
    report = {"settings": asdict(settings), **figures}
    write_note(out / REPORT, report)
    return report
