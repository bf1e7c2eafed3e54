"""How does one benchmark run from start to finish? Identity, answers, results, report.

`evaluate` is what `vlm eval` calls once per task; it takes any answerer, so tests run it with an
oracle.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from eval.gallery import draw_gallery
from eval.report import markdown_report
from eval.results import protocol_manifest, summarise
from eval.runner import IMAGE, Answerer, RunPlan, answer_all
from eval.samples import SampleStore
from eval.settings import AnswerSettings
from eval.task import Task
from vlm.answers import PARSER_VERSION
from vlm.errors import UserError

VERSIONED = ("vlm-suite", "torch", "transformers", "tokenizers", "numpy", "pillow", "pyarrow")


class IdentifiedAnswerer(Answerer, Protocol):
    """An answerer that can say who it is."""

    def identity(self) -> dict[str, str]:
        """Return fingerprints that differ whenever the answers could."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Messages:
    """Where a run tells its user what it does."""

    say: Callable[[str], None]
    progress: Callable[[int, int], None]  # (new answers, all answers)


QUIET = Messages(say=lambda _: None, progress=lambda *_: None)


def evaluate(
    task: Task,
    answerer: IdentifiedAnswerer,
    settings: AnswerSettings,
    plan: RunPlan,
    folder: Path,
    about: Mapping[str, Any],
    messages: Messages = QUIET,
) -> dict[str, Any]:
    """Answer what is missing, write results, report and gallery, and return the results.

    Args:
        task: the benchmark.
        answerer: the model.
        settings: what is asked of the model.
        plan: which questions, how worded, in which views.
        folder: receives samples.jsonl, results.json, report.md and gallery.png.
        about: further lines of the manifest (model path, device, ...).
        messages: where progress goes.

    Raises:
        UserError: a picture cannot be decoded, or the folder cannot be written.
        KeyboardInterrupt: after telling what is saved.
    """
    started = time.monotonic()
    store = SampleStore(folder, _identity(task, answerer, settings, plan))
    if store.set_aside is not None:
        messages.say(
            f"{folder} holds answers of another run ({', '.join(store.changed)} changed); they are "
            f"kept in {store.set_aside.name}, and {store.path.name} "
            + ("goes on where this run stopped" if store.found else "begins anew")
        )
    messages.progress(_held(store, plan), plan.num_answers)
    try:
        answer_all(
            task, answerer, store, plan, lambda new: messages.progress(new, plan.num_answers)
        )
    except KeyboardInterrupt:
        messages.say(
            f"{_held(store, plan)} of {plan.num_answers} answers are saved in {store.path}"
        )
        raise
    finally:
        store.close()
    results = summarise(task, store, plan, settings.scorings, settings.strategy)
    results["manifest"] = _manifest(task, store, settings, plan, about)
    results["run"] = {
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_mb": _peak_memory_mb(),
        "answers_new": len(store.rows) - store.found,
        "answers_found": store.found,
    }
    _write(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "report.md", markdown_report(results))
    rows = [store.rows[index, IMAGE] for index in plan.indices]
    draw_gallery(task, rows, task.breakdowns[0], folder / "gallery.png")
    return results


def _held(store: SampleStore, plan: RunPlan) -> int:
    """Count the plan's answers that the store holds."""
    return sum((index, view) in store.rows for index in plan.indices for view in plan.views)


def _identity(
    task: Task, answerer: IdentifiedAnswerer, settings: AnswerSettings, plan: RunPlan
) -> dict[str, Any]:
    """Return all that an answer depends on; batch size and number of questions are not in it."""
    return {
        **answerer.identity(),
        "benchmark": task.name,
        "data": [file.sha256 for file in task.files],
        "protocol": protocol_manifest(plan.protocol),
        "strategy": settings.strategy,
        "scorings": sorted(settings.scorings),
        "max_new_tokens": settings.max_new_tokens,
        "parser": PARSER_VERSION,
    }


def _manifest(
    task: Task,
    store: SampleStore,
    settings: AnswerSettings,
    plan: RunPlan,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what somebody needs to make the same numbers again."""
    first = task.get_example(plan.indices[0])
    return {
        **about,
        "weights": store.identity["weights"],
        "processor": store.identity["processor"],
        "data": [dataclasses.asdict(file) for file in task.files],
        "questions": len(plan.indices),
        "views": list(plan.views),
        "breakdowns": list(task.breakdowns),
        "protocol": protocol_manifest(plan.protocol),
        "first_prompt": plan.protocol.wrap(first.prompt),
        "settings": dataclasses.asdict(settings) | {"scorings": list(settings.scorings)},
        "batch_size": plan.batch_size,
        "parser_version": PARSER_VERSION,
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in VERSIONED},
        },
    }


def _peak_memory_mb() -> int:
    """Return the process's largest resident size; on a GPU, the largest allocation there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return peak >> 20 if sys.platform == "darwin" else peak >> 10


def _write(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; the answers are saved, make room and "
            "run the same command again"
        ) from error
