"""From nothing to a trained, scored, chattable model: the commands a reader would type, in order.

vlm quickstart                            into runs/quickstart, about 12 minutes on two CPU cores
vlm quickstart --out runs/b --seed 1      other weights, data and order
vlm quickstart --rehearse                 every step with next to no training, in about a minute

What is done is found and kept; a killed run goes on where it stopped.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = Path("train/recipes/quickstart.yaml")
STEPS_FILE = "steps.json"
REPORT_FILE = "report.json"
TASKS = ("Relation", "Count", "Depth", "Distance")

# What --rehearse changes: sizes only, no step is left out.
REHEARSAL = {
    "scenes": ["--train", "200", "--test-per-task", "16", "--control", "16"],
    "encoder": ["--steps", "5"],
    "language-model": ["--steps", "5"],
    "stages": ["--stages.align.training.max_steps=3", "--stages.instruct.training.max_steps=3"],
    "score": ["--max-new-tokens", "8"],
}


@dataclass(frozen=True)
class Step:
    """Commands (the words after `vlm`) that run side by side."""

    title: str
    commands: list[list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where, which seed, and whether it is only a rehearsal."""
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true", help="hardly train; scores mean nothing")


def run(args: argparse.Namespace) -> int:
    """Run all steps that are not done yet, write report.json, print the scores.

    Raises:
        UserError: the folder cannot be used, or a command failed.
        KeyboardInterrupt: the user stopped it; what is done is kept.
    """
    from vlm.child_commands import only_one  # heavy, like all of `run`
    from vlm.done import make_folder, read_done, write_note

    out: Path = args.out
    make_folder(out)
    settings = {"seed": args.seed, "rehearsal": args.rehearse}
    note = out / STEPS_FILE
    done = read_done(note, settings, "a quickstart") or {"settings": settings, "steps": {}}
    steps = plan(out, args.seed, args.rehearse)
    with only_one(out, "a quickstart") as lock:
        for number, step in enumerate(steps, start=1):
            entry = done["steps"].setdefault(step.title, {"done": False, "starts": 0})
            if entry["done"]:
                print(f"[{number}/{len(steps)}] {step.title}: done before", flush=True)
                continue
            print(f"[{number}/{len(steps)}] {step.title}", flush=True)
            for words in step.commands:
                print(f"    vlm {shlex.join(words)}", flush=True)
            entry["starts"] += 1
            write_note(note, done)
            seconds, memory_mb = _run_step(step, lock)
            entry |= {"done": True, "seconds": round(seconds, 1), "peak_memory_mb": memory_mb}
            write_note(note, done)
    report = make_report(out, done["steps"])
    write_note(out / REPORT_FILE, report)
    print(summary(out, report))
    return 0


def plan(out: Path, seed: int, rehearse: bool) -> list[Step]:
    """Return the steps; every one is idempotent and goes on where it was killed."""
    data, encoder, language_model = out / "data", out / "base/encoder", out / "base/language_model"
    small = REHEARSAL if rehearse else {key: [] for key in REHEARSAL}
    seed_words = ["--seed", str(seed)]
    train = data / "train"
    stages = {
        "output_dir": out / "vlm",
        "seed": seed,
        "feature_cache.folder": out / "features",
        "model.vision_encoder.source": encoder,
        "model.language_model": language_model,
        "stages.align.data.sources.captions.path": train / "captions.jsonl",
        "stages.instruct.data.sources.questions.path": train / "questions.jsonl",
        "stages.instruct.data.sources.captions.path": train / "captions.jsonl",
    }
    overrides = [f"--{name}={value}" for name, value in stages.items()]
    build = ["data", "build", "scenes", "--out", str(data), "--workers", "2"]
    base = ["base", "encoder", "--out", str(encoder), *seed_words, *small["encoder"]]
    text = ["base", "language-model", "--out", str(language_model), *seed_words]
    score = ["eval", str(out / "vlm/instruct"), "--tasks", "cv_bench"]
    score += ["--max-new-tokens", "64", *small["score"]]
    return [
        Step(
            "scenes: render training pictures and the held-out benchmark",
            [[*build, *seed_words, *small["scenes"]]],
        ),
        Step(
            "base models: an encoder from pictures, a language model from text, one core each",
            [base, [*text, *small["language-model"]]],
        ),
        Step(
            "stage 1 align (connector on captions), stage 2 instruct (connector, language model)",
            [["train", str(_recipe()), *overrides, *small["stages"]]],
        ),
        Step(
            "score: held-out scenes, with and without the picture",
            [[*score, "--data", str(data / "test.parquet"), "--out", str(out / "eval")]],
        ),
        Step(
            "control: depth of objects that hover, where height in the picture says nothing",
            [[*score, "--data", str(data / "control.parquet"), "--out", str(out / "control")]],
        ),
    ]


def _run_step(step: Step, lock: int) -> tuple[float, int]:
    """Run a step's commands; return wall seconds and the peak of their memory together, in MB.

    Raises:
        UserError: a command failed; its own sentence stands above.
        KeyboardInterrupt: the user stopped it; the commands have saved what they had.
    """
    from vlm.child_commands import run_side_by_side
    from vlm.errors import UserError

    ended = run_side_by_side(step.commands, lock)
    for number, code in ended.failed:
        raise UserError(
            f"`vlm {' '.join(step.commands[number][:2])} ...` ended with exit code {code}; what "
            "was done is kept, and the same command goes on"
        )
    return ended.seconds, ended.peak_memory_mb


def make_report(out: Path, steps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the run took and scored."""
    scores = _results(out / "eval")
    control = _results(out / "control")
    wanted = ("n", "accuracy", "low", "high", "chance", "blind", "blind_low", "blind_high")
    return {
        "seconds": round(sum(step["seconds"] for step in steps.values()), 1),
        "peak_memory_mb": max(step["peak_memory_mb"] for step in steps.values()),
        "tasks": {task: {key: scores["tasks"][task][key] for key in wanted} for task in TASKS},
        "control": {key: control["tasks"]["Depth"][key] for key in wanted},
        # A step that was killed and started again counts the seconds of its last start alone.
        "resumed": any(step["starts"] > 1 for step in steps.values()),
        "steps": steps,
    }


def summary(out: Path, report: dict[str, Any]) -> str:
    """Return the closing table and the two lines to type next."""
    head = f"{'task':<18}{'n':>6}{'accuracy':>10}  {'95 % interval':<16}{'chance':>7}"
    lines = ["", f"{head}{'no picture':>12}"]
    rows = [*report["tasks"].items(), ("Depth, hovering", report["control"])]
    for name, cell in rows:
        interval = f"[{cell['low']:.3f}, {cell['high']:.3f}]"
        lines.append(
            f"{name:<18}{cell['n']:>6}{cell['accuracy']:>10.3f}  {interval:<16}"
            f"{cell['chance']:>7.3f}{cell['blind']:>12.3f}"
        )
    minutes = report["seconds"] / 60
    lines += [
        "",
        f"{minutes:.1f} minutes, {report['peak_memory_mb']} MB at most; {out / REPORT_FILE}",
        "Next:",
        f"    vlm chat {out / 'vlm/instruct'} {out / 'data/train/images/000000.png'}",
        f"    vlm eval {out / 'vlm/instruct'} --tasks cv_bench --data {out / 'data/test.parquet'} "
        f"--out {out / 'eval'}",
    ]
    return "\n".join(lines)


def _recipe() -> Path:
    """Return the recipe's path, as a reader in the repository would type it."""
    return RECIPE if RECIPE.exists() else Path(__file__).parents[1] / RECIPE


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
