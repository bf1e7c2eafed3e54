"""What is told while a stage trains? A progress line, a log that survives a kill, a clean stop."""

import json
import signal
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.averages import WeightAverage
from vlm.done import write_flushed

# What the progress line tells, in this order.
TOLD = {
    "loss": "loss {:.4f}",
    "validation_loss": "validation {:.4f}",
    "supervised_tokens_per_second": "{:.0f} tokens/s",
    "samples_per_second": "{:.1f} samples/s",
    "padding_share": "padding {:.0%}",
    "data_wait_share": "waiting for data {:.0%}",
    "mfu": "MFU {:.1%}",
    "peak_memory_gb": "{:.2f} GB",
}


class LogWithCheckpoint(TrainerCallback):
    """Also log at every checkpoint: a resumed run then averages its losses over the same steps."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_save:
            control.should_log = True


class KeepAverage(TrainerCallback):
    """Take every step's weights into their average, before a checkpoint is written."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.average.update(model, state.global_step)


class ProgressLine(TrainerCallback):
    """One line on the terminal: step, loss and whatever rates the log holds.

    A context that ends it: what stops a stage is told on a line of its own.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step"
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            told = [text.format(float(logs[key])) for key, text in TOLD.items() if key in logs]
            self.bar.set_postfix_str(", ".join(told))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLog(TrainerCallback):
    """Append one JSON line per log entry; a resumed run first drops lines after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            write_flushed(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training log; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class StopCleanly(TrainerCallback):
    """Turn the first Ctrl-C (or SIGTERM) into: finish the step, save, stop. The second one kills.

    With several ranks they agree after each step, because saving is a common act.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopCleanly":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        signal.signal(number, self._before[number])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        asked = self.asked
        if args.world_size > 1:
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_log = control.should_training_stop = True
