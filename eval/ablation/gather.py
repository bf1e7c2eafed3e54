"""What do all runs together say? Their answers, times and costs become one report."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.ablation.comparison import columns_of, compare
from eval.ablation.measure import Clip, Medium, Picture, Probe, measure
from eval.ablation.rows import Row
from eval.ablation.runs import Run, Scoring, read_json
from eval.protocols import PROTOCOLS
from eval.runner import IMAGE
from eval.samples import read_answers
from eval.task import Task, told_with
from vlm.done import write_note
from vlm.errors import UserError
from vlm.video import video_facts

Json = dict[str, Any]
COSTS_FILE = "costs.json"
# What may differ between the answers of two rows: all else in their identity must agree.
OWN_IDENTITY = {"weights", "processor"}


def make_report(
    task: Task,
    indices: Sequence[int],
    rows: Sequence[Row],
    runs: Sequence[Run],
    scoring: Scoring,
    costs: Mapping[str, Json],
) -> Json:
    """Return all figures of the table.

    Args:
        task: the benchmark.
        indices: the questions that were asked.
        rows: in the order of the table.
        runs: of these rows; some may have failed.
        scoring: how they were scored.
        costs: of each row that has a trained model.
    """
    examples = [task.get_example(index) for index in indices]
    columns = columns_of(examples, task.formulas(examples)[0], task.breakdowns[0])
    done = [run for run in runs if run.is_scored(scoring)]
    answers = read_right(done, task, indices)
    compared = compare({row.name: answers.get(row.name, {}) for row in rows}, columns)
    found: Json = {}
    for row in rows:
        own = [run for run in runs if run.row == row]
        found[row.name] = {
            "trainings": sum(run in done for run in own),
            "failed": {str(run.seed): run.note()["failed"] for run in own if run not in done},
            "scores": compared[row.name],
            "costs": {
                **costs.get(row.name, {}),
                **training_costs([run for run in own if run in done]),
            },
            "changes": dict(row.changes),
        }
    return {
        "benchmark": task.label(indices),
        "columns": [
            {"name": c.name, "text": c.text, "n": c.n, "chance": c.chance} for c in columns
        ],
        "rows": found,
        "same_data": same_data(done),
        "features_read": features_read(done),
    }


def read_right(
    done: Sequence[Run], task: Task, indices: Sequence[int]
) -> dict[str, dict[str, np.ndarray]]:
    """Return row -> seed -> which questions it answered rightly, (Q,), in the order of `indices`.

    Raises:
        UserError: two runs were not asked in the same way.
    """
    first: tuple[Run, Json] | None = None
    answers: dict[str, dict[str, np.ndarray]] = {}
    for run in done:
        identity, rows = read_answers(run.scores)
        asked = {name: value for name, value in identity.items() if name not in OWN_IDENTITY}
        first = first or (run, asked)
        if asked != first[1]:
            names = sorted(name for name in asked if asked[name] != first[1].get(name))
            raise UserError(
                f"{run.scores} and {first[0].scores} were not asked alike ({', '.join(names)} "
                "differ); delete both folders, and the same command asks again"
            )
        answers.setdefault(run.row.name, {})[str(run.seed)] = np.array(
            [task.score(task.get_example(i), rows[i, IMAGE]["likelihood"]) for i in indices]
        )
    return answers


def training_costs(runs: Sequence[Run]) -> Json:
    """Return seconds and memory of a row's trainings: the mean and the largest."""
    if not runs:
        return {}
    seconds = [sum(stage["seconds"] for stage in run.manifests()) for run in runs]
    on_device = [
        stage["peak_memory_mb"]["device"]
        for run in runs
        for stage in run.manifests()
        if "device" in stage["peak_memory_mb"]
    ]
    on_host = [run.note()["peak_memory_mb"] for run in runs]
    return {
        "training_seconds": float(np.mean(seconds)),
        "training_peak_mb": max(on_device or on_host),
        "resumed": any(run.note()["starts"] > 1 for run in runs),
    }


def same_data(done: Sequence[Run]) -> bool:
    """Return whether all runs read the same files, byte for byte, as their manifests say."""
    read = [[stage.get("data") for stage in run.manifests()] for run in done]
    return all(each == read[0] for each in read)


def features_read(done: Sequence[Run]) -> tuple[int, int]:
    """Return in how many stages, of how many, the encoder's features came from disk."""
    notes = [stage.get("feature_cache") or {} for run in done for stage in run.manifests()]
    return sum(bool(note.get("used")) for note in notes), len(notes)


def measured_costs(
    task: Task, indices: Sequence[int], done: Sequence[Run], rounds: int, out: Path
) -> dict[str, Json]:
    """Return what one picture costs in each row, measured on its first run; kept in costs.json."""
    models: dict[str, Path] = {}
    for run in done:
        models.setdefault(run.row.name, run.model)
    if not models:
        return {}
    threads = done[0].recipe["num_threads"] or torch.get_num_threads()
    settings = {
        "models": {name: [str(path), _written(path)] for name, path in models.items()},
        "rounds": rounds,
        "threads": threads,
        "machine": machine(),
        "question": indices[0],
    }
    kept = read_json(out / COSTS_FILE)
    if kept.get("settings") == json.loads(json.dumps(settings)):
        return kept["costs"]
    torch.set_num_threads(threads)
    costs = measure(models, probe_of(task, indices[0]), pictures_of(task, indices), rounds)
    write_note(out / COSTS_FILE, {"settings": settings, "costs": costs})
    return costs


def _written(model: Path) -> int:
    """Return when a model's weights were written, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in model.glob("*.safetensors"))


def probe_of(task: Task, index: int) -> Probe:
    """Return a question as it is put to the models."""
    example, protocol = task.get_example(index), PROTOCOLS["official"]
    return Probe(
        media=task.media(index),
        messages=task.prompt(example, protocol, blind=False),
        blind_messages=task.prompt(example, protocol, blind=True),
    )


def pictures_of(task: Task, indices: Sequence[int]) -> Counter[Medium]:
    """Return how many pictures of each size the questions have, and how often each video."""
    found: Counter[Medium] = Counter()
    for index in indices:
        media = task.media(index)
        siblings = sum(isinstance(each, Image.Image) for each in media)
        with told_with(task.where(index)):
            found.update(
                Picture(each.size, siblings)
                if isinstance(each, Image.Image)
                else Clip(video_facts(each).times)
                for each in media
            )
    return found


def machine() -> str:
    """Return what the processor that computes is called."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unnamed processor"
