"""How does an ablation go from its words to its table? This file is the table of contents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.registry import lookup
from eval.ablation.checks import check_recipe, check_rows
from eval.ablation.execution import execute
from eval.ablation.fit import Fit
from eval.ablation.gather import machine, make_report, measured_costs
from eval.ablation.plot import draw
from eval.ablation.rows import Row, rows_of
from eval.ablation.runs import Run, Scoring, claim, read_json, runs_of, share_features
from eval.ablation.table_text import csv_text, failures, markdown
from eval.ablation.words import conclusion, notes
from eval.report import with_interval
from eval.runner import choose_indices
from eval.tasks import TASKS
from vlm.child_commands import only_one
from vlm.done import make_folder, write_flushed, write_note

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
    share_features: bool
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
    if request.share_features:
        runs = share_features(runs, request.out)
    fits = check_rows(base, runs[: len(rows)])  # those of the first seed
    for run in runs:
        claim(run)
    task = lookup("task", request.task, TASKS, "vlm.tasks").open(request.data)
    scoring = Scoring(request.score, tuple(file.sha256 for file in task.files))
    print(plan_text(rows, fits, runs, scoring), flush=True)
    if dry_run:
        return 0
    make_folder(request.out)
    with only_one(request.out, WHAT) as lock:
        run_all(runs, scoring, lock)
        indices = choose_indices(task, request.limit)
        done = [run for run in runs if run.is_scored(scoring)]
        print("measuring what one picture costs", flush=True)
        costs = measured_costs(task, indices, done, request.rounds, request.out)
        report = make_report(task, indices, rows, runs, scoring, costs)
        report["title"] = f"{Path(request.recipe).stem}: {' x '.join(request.vary)}"
        report["elsewhere"] = other_rows(request.out, rows)
        report["measured"] = {
            "machine": machine(),
            "threads": base["num_threads"] or "all",
            "rounds": request.rounds,
        }
        text = write_report(report, request.out)
    print(f"\n{text}\n{request.out / 'table.md'}, table.csv, plot.png, ablation.json")
    return 1 if failures(report) else 0


def plan_text(
    rows: Sequence[Row], fits: Mapping[str, Fit], runs: Sequence[Run], scoring: Scoring
) -> str:
    """Return what is there and what will run, one line per row."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'row':<{width}}  tokens/view  connector  to train  to score"]
    for row in rows:
        fit = fits[row.name]
        own = [run for run in runs if run.row == row]
        train = sum(not run.is_trained for run in own)
        scores = sum(not run.is_scored(scoring) for run in own)
        lines.append(
            f"{row.name:<{width}}  {fit.view_tokens:>11}  "
            f"{fit.parameters['connector'] / 1e6:>7.3f} M  {train:>8}  {scores:>8}"
        )
    return "\n".join(lines)


def run_all(runs: Sequence[Run], scoring: Scoring, lock: int) -> None:
    """Train and score what is not done, one run after the other."""
    for number, run in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {run.name}"
        if run.is_scored(scoring):
            print(f"{head}: done before", flush=True)
            continue
        print(f"{head}: {'scoring' if run.is_trained else 'training, scoring'}", flush=True)
        execute(run, scoring, lock)
        print(f"{head}: {run.note()['failed'] or score_text(run)}", flush=True)


def score_text(run: Run) -> str:
    """Return a run's score in one line."""
    headline = read_json(run.scores / "results.json")["headline"]
    return f"{headline['name']} {with_interval(headline)}"


def other_rows(out: Path, rows: Sequence[Row]) -> list[str]:
    """Return the folders of rows that an earlier call left here and this one did not ask for."""
    asked = {row.folder for row in rows}
    return sorted(path.name for path in (out / "runs").iterdir() if path.name not in asked)


def write_report(report: Json, out: Path) -> str:
    """Write ablation.json, table.md, table.csv and plot.png; return the table's text."""
    text = markdown(report, report["title"], conclusion(report), notes(report))
    write_note(out / "ablation.json", report)
    write_flushed(out / "table.md", text)
    write_flushed(out / "table.csv", csv_text(report))
    if not draw(report, out / "plot.png"):
        (out / "plot.png").unlink(missing_ok=True)  # of an earlier call
    return text
