"""How does an ablation go from its words to its table? This file is the table of contents."""

import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from connectors.registry import lookup
from eval.ablation.comparison import columns_of, compare
from eval.ablation.fit import Fit, Parts
from eval.ablation.measure import Picture, Probe, measure
from eval.ablation.rows import Row, rows_of
from eval.ablation.runs import Run, claim, execute, runs_of
from eval.ablation.table_text import csv_text, markdown
from eval.protocols import PROTOCOLS
from eval.runner import IMAGE, choose_indices
from eval.samples import read_answers
from eval.task import Task
from eval.tasks import TASKS
from vlm.child_commands import only_one
from vlm.done import make_folder, write_flushed, write_note
from vlm.errors import UserError
from vlm.yaml_values import parse_value

Json = dict[str, Any]
WHAT = "an ablation"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; see `vlm ablate --help`."""

    recipe: str
    overrides: tuple[str, ...]
    vary: tuple[str, ...]
    seeds: int | None
    task: str
    data: tuple[Path, ...]
    limit: int | None
    score: tuple[str, ...]
    rounds: int
    out: Path


def ablate(request: Request, dry_run: bool) -> int:
    """Check, train, score, measure, compare; return the exit code.

    Raises:
        UserError: something is wrong that can be told before the first training.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    rows = rows_of(request.vary)
    base = check_recipe(request.recipe, request.overrides)
    seeds = range(request.seeds) if request.seeds else [base["seed"]]
    runs = runs_of(base, rows, seeds, request.out)
    fits = check_rows(base, rows, runs)
    for run in runs:
        claim(run)
    task = lookup("task", request.task, TASKS, "vlm.tasks").open(request.data)
    print(plan_text(rows, fits, runs, request.score), flush=True)
    if dry_run:
        return 0
    make_folder(request.out)
    with only_one(request.out, WHAT) as lock:
        run_all(runs, request.score, lock)
        report = make_report(request, task, rows, runs)
        write_note(request.out / "ablation.json", report)
        write_flushed(request.out / "table.md", markdown(report))
        write_flushed(request.out / "table.csv", csv_text(report))
    print(markdown(report))
    return 1 if any(row["failed"] for row in report["rows"].values()) else 0


def check_recipe(recipe: str, overrides: Sequence[str]) -> Json:
    """Return a recipe in full, as `vlm train --check` prints it.

    Raises:
        UserError: it is wrong; the sentence is that of `vlm train`.
    """
    command = [sys.executable, "-m", "vlm", "train", recipe, *overrides, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(said[-1].removeprefix("vlm train: "))
    return parse_value(done.stdout, "vlm train --check")


def check_rows(base: Json, rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, Fit]:
    """Return what each row's parts are, after checking that they fit.

    Raises:
        UserError: a row cannot be trained.
    """
    if base["model"]["checkpoint"] is not None:
        raise UserError(
            "the recipe starts from model.checkpoint, so its parts cannot be varied; name "
            "vision_encoder, connector and language_model instead"
        )
    for stage in base["stages"]:
        if stage["length_window"] > 1:
            raise UserError(
                f"stages.{stage['name']}.length_window is {stage['length_window']}: the order of "
                "records would then depend on how many tokens a picture takes; set it to 1 or 0"
            )
    parts, fits = Parts(), {}
    for row, run in zip(rows, runs, strict=False):
        try:
            fits[row.name] = parts.check(run.recipe["model"])
        except UserError as error:
            raise UserError(f"row {row.name!r}: {error}") from error
    return fits


def plan_text(
    rows: Sequence[Row], fits: Mapping[str, Fit], runs: Sequence[Run], score: Sequence[str]
) -> str:
    """Return what is there and what will run, one line per row."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'row':<{width}}  tokens/view  connector  to train  to score"]
    for row in rows:
        fit = fits[row.name]
        own = [run for run in runs if run.row == row]
        train = sum(not run.is_trained for run in own)
        scores = sum(not run.is_scored(score) for run in own)
        lines.append(
            f"{row.name:<{width}}  {fit.view_tokens:>11}  "
            f"{fit.parameters['connector'] / 1e6:>7.3f} M  {train:>8}  {scores:>8}"
        )
    return "\n".join(lines)


def run_all(runs: Sequence[Run], score: Sequence[str], lock: int) -> None:
    """Train and score what is not done, one run after the other."""
    for number, run in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {run.name}"
        if run.is_scored(score):
            print(f"{head}: done before", flush=True)
            continue
        print(f"{head}: {'scoring' if run.is_trained else 'training'}", flush=True)
        execute(run, score, lock)
        note = run.note()
        said = note["failed"] or f"{note['seconds']:.0f} s, {note['peak_memory_mb']} MB"
        print(f"{head}: {said}", flush=True)


def make_report(request: Request, task: Task, rows: Sequence[Row], runs: Sequence[Run]) -> Json:
    """Return all figures of the table."""
    indices = choose_indices(task, request.limit)
    examples = [task.get_example(index) for index in indices]
    columns = columns_of(examples, task.formulas(examples)[0], task.breakdowns[0])
    done = [run for run in runs if run.is_scored(request.score)]
    answers: dict[str, dict[int, np.ndarray]] = {row.name: {} for row in rows}
    for run in done:
        answers[run.row.name][run.seed] = read_right(run, task, indices)
    compared = compare(answers, columns)
    costs = measure_costs(task, indices, done, request.rounds)
    found: Json = {}
    for row in rows:
        own = [run for run in runs if run.row == row]
        notes = [run.note() for run in own if run in done]
        failed = {run.seed: run.note()["failed"] for run in own if run not in done}
        training = (
            {
                "training_seconds": float(np.mean([note["seconds"] for note in notes])),
                "training_peak_mb": max(note["peak_memory_mb"] for note in notes),
            }
            if notes
            else {}
        )
        found[row.name] = {
            "trainings": len(notes),
            "failed": failed,
            "scores": compared[row.name],
            "costs": costs.get(row.name, {}) | training,
            "changes": dict(row.changes),
        }
    return {
        "recipe": request.recipe,
        "varied": list(request.vary),
        "columns": [
            {"name": c.name, "text": c.text, "n": c.n, "chance": c.chance} for c in columns
        ],
        "rows": found,
        "notes": [f"Measured on {machine()}, {torch.get_num_threads()} threads."],
    }


def read_right(run: Run, task: Task, indices: Sequence[int]) -> np.ndarray:
    """Return which questions a run answered rightly, (Q,), in the order of `indices`."""
    _, rows = read_answers(run.scores)
    right = [task.score(task.get_example(i), rows[i, IMAGE]["likelihood"]) for i in indices]
    return np.array(right)


def measure_costs(
    task: Task, indices: Sequence[int], done: Sequence[Run], rounds: int
) -> dict[str, Json]:
    """Return what one picture costs in each row, measured on the first run that it has."""
    models: dict[str, Path] = {}
    for run in done:
        models.setdefault(run.row.name, run.model)
    if not models:
        return {}
    pictures: Counter[Picture] = Counter()
    for index in indices:
        images = task.images(index)
        pictures.update(Picture(image.size, len(images)) for image in images)
    example, protocol = task.get_example(indices[0]), PROTOCOLS["official"]
    probe = Probe(
        image=task.images(indices[0])[0],
        messages=task.prompt(example, protocol, blind=False),
        blind_messages=task.prompt(example, protocol, blind=True),
    )
    torch.set_num_threads(threads_of(done[0]))
    return measure(models, probe, pictures, rounds)


def threads_of(run: Run) -> int:
    """Return the CPU threads that the recipe asks for, torch's own choice if it does not."""
    return run.recipe["num_threads"] or torch.get_num_threads()


def machine() -> str:
    """Return what the machine is called."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def to_json(report: Json) -> str:
    """Return the report as text."""
    return json.dumps(report, indent=2)
