"""How good is a stage's newest checkpoint at a benchmark? `vlm eval` tells, as a child process.

The training waits for it: both want the same device. The scores are told, shown beside the loss in
TensorBoard and kept in `benchmark.jsonl`. What `vlm eval` would refuse is told before the training
begins. A benchmark that fails later is told, and again at the end of the run, which is not lost: it
goes on and ends with 0; the manifest has the steps.
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from train.checkpoints import PREFIX
from train.process import is_main_process, say
from train.trainer import VlmTrainer
from vlm.cli import main
from vlm.errors import UserError

LOG_NAME = "benchmark.jsonl"
# What a launcher tells the processes it starts; a benchmark is none of them.
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_scores(folder: Path) -> dict[str, float]:
    """Return accuracies of what `vlm eval` wrote: of each benchmark, and of each of its tasks."""
    found: dict[str, float] = {}
    for path in sorted(folder.rglob("results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        found[results["benchmark"]] = results["headline"]["accuracy"]
        for task, cell in results["tasks"].items():
            found[f"{results['benchmark']}/{task}"] = cell["accuracy"]
    return found


def check_words(words: Sequence[str]) -> None:
    """Let `vlm eval` look at its words and the data that they name.

    Raises:
        UserError: it refuses them; the sentence is its own.
    """
    told = io.StringIO()
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        try:
            code = main(["eval", "--check", *words])
        except SystemExit as stop:  # argparse's
            code = stop.code
    if code:
        sentence = told.getvalue().strip().rpartition("\n")[2].removeprefix("vlm eval: ")
        raise UserError(f"vlm eval {' '.join(words)}: {sentence}")


def failed_steps(folder: Path) -> list[int]:
    """Return the steps of a stage whose benchmark failed."""
    return [line["step"] for line in _read(folder / LOG_NAME) if "error" in line]


def tell_failures(folder: Path) -> None:
    """Say on stderr at which steps a stage's benchmark failed, if it did."""
    steps = ", ".join(map(str, failed_steps(folder)))
    if steps and is_main_process():
        told = f"stage {folder.name}: trained to its end, but its benchmark failed at step {steps}"
        print(f"{told}; {folder / LOG_NAME} says why", file=sys.stderr)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return what is known of the steps that were scored."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def run_alone(command: Sequence[str], log: Path) -> int:
    """Run a command that knows nothing of this launch, and return its exit code."""
    known = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    with log.open("ab") as file:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=known, check=False
        ).returncode


class Benchmark(TrainerCallback):
    """Scores the checkpoints of every n-th step, and the last one.

    Args:
        trainer: tells the scores.
        folder: the stage's; answers and reports go to `benchmark/<step>`.
        words: of `vlm eval` behind the model, such as ["--tasks", "cv_bench", "--data", FILE].
        every: optimizer steps.
    """

    def __init__(self, trainer: VlmTrainer, folder: Path, words: Sequence[str], every: int) -> None:
        self.trainer = trainer
        self.folder = folder
        self.words = list(words)
        self.every = every

    def _is_due(self, state: TrainerState) -> bool:
        last = state.global_step >= state.max_steps
        return state.global_step > 0 and (last or state.global_step % self.every == 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        """Make up for what a kill came before."""
        if self._is_due(state) and state.global_step not in self._known():
            self._score(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        if self._is_due(state):
            control.should_save = control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self._is_due(state):
            self._score(args, state)

    def _known(self) -> set[int]:
        return {line["step"] for line in _read(self.folder / LOG_NAME)}

    def _score(self, args: TrainingArguments, state: TrainerState) -> None:
        """Score a step's checkpoint on the main process, while the others wait."""
        start, step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            scores, fault = self._run(step)
            told = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            say(f"benchmark at step {step}: {fault or told}")
            line = {"step": step, **scores, **({"error": fault} if fault else {})}
            with (self.folder / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.trainer.log({f"benchmark/{name}": score for name, score in scores.items()})
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.window.leave_out(time.perf_counter() - start)

    def _run(self, step: int) -> tuple[dict[str, float], str | None]:
        """Return (scores, None), or ({}, what went wrong)."""
        out = self.folder / "benchmark" / str(step)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = self.folder / "checkpoints" / f"{PREFIX}{step}"
        command = [sys.executable, "-m", "vlm", "eval", str(checkpoint), *self.words]
        if code := run_alone([*command, "--out", str(out)], out / "eval.log"):
            return {}, f"vlm eval ended with {code}, see {out / 'eval.log'}"
        return read_scores(out), None
