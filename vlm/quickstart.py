"""From nothing to a trained, scored, chattable model: the commands a reader would type, in order.

vlm quickstart                            into runs/quickstart, about 10 minutes on two CPU cores
vlm quickstart --out runs/b --seed 1      other weights, data and order
vlm quickstart --rehearse                 every step with next to no training, in about a minute

What is done is found and kept; a killed run goes on where it stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = Path("train/recipes/quickstart.yaml")
STEPS_FILE = "steps.json"
REPORT_FILE = "report.json"
TASKS = ("Relation", "Count", "Depth", "Distance")
SAMPLE_SECONDS = 0.25  # between two looks at the memory of the running commands

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
    """Run all steps that are not done yet, write report.json, print the scores."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    done = _read_steps(out / STEPS_FILE, {"seed": args.seed, "rehearsal": args.rehearse})
    steps = plan(out, args.seed, args.rehearse)
    for number, step in enumerate(steps, start=1):
        if step.title in done["steps"]:
            print(f"[{number}/{len(steps)}] {step.title}: done before", flush=True)
            continue
        print(f"[{number}/{len(steps)}] {step.title}", flush=True)
        for words in step.commands:
            print(f"    vlm {shlex.join(words)}", flush=True)
        seconds, memory_mb = _run_side_by_side(step.commands)
        done["steps"][step.title] = {"seconds": round(seconds, 1), "peak_memory_mb": memory_mb}
        _write(out / STEPS_FILE, done)
    report = make_report(out, done["steps"])
    _write(out / REPORT_FILE, report)
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


def _run_side_by_side(commands: Sequence[Sequence[str]]) -> tuple[float, int]:
    """Run the commands at once; return wall seconds and the peak of their memory together, in MB.

    Raises:
        UserError: a command failed; its own sentence stands above.
        KeyboardInterrupt: the user stopped it; the commands have saved what they had.
    """
    started, peak = time.perf_counter(), 0
    children = [
        subprocess.Popen([sys.executable, "-m", "vlm", *words], stdin=subprocess.DEVNULL)
        for words in commands
    ]
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            peak = max(peak, sum(_tree_memory(child.pid) for child in children))
            time.sleep(SAMPLE_SECONDS)
    finally:
        # After Ctrl-C the children got the signal too; they finish their step and save.
        for child in children:
            if child.poll() is None and any(other.poll() for other in children):
                child.terminate()
        codes = [child.wait() for child in children]
    for words, code in zip(commands, codes, strict=True):
        if code == 130:
            raise KeyboardInterrupt
        if code:
            from vlm.errors import UserError  # not above: beside the children it is 200 MB of torch

            raise UserError(
                f"`vlm {' '.join(words[:2])} ...` ended with exit code {code}; what was done is "
                "kept, and the same command goes on from there"
            )
    return time.perf_counter() - started, round(peak / 1e6)


def _tree_memory(pid: int) -> int:
    """Return the resident memory of a process and its children in bytes, 0 if it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.NoSuchProcess:
        return 0


def make_report(out: Path, steps: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what the run took and scored."""
    scores = _results(out / "eval")
    control = _results(out / "control")
    wanted = ("n", "accuracy", "low", "high", "chance", "blind", "blind_low", "blind_high")
    return {
        "seconds": round(sum(step["seconds"] for step in steps.values()), 1),
        "peak_memory_mb": max(step["peak_memory_mb"] for step in steps.values()),
        "tasks": {task: {key: scores["tasks"][task][key] for key in wanted} for task in TASKS},
        "control": {key: control["tasks"]["Depth"][key] for key in wanted},
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


def _read_steps(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return which steps are done.

    Raises:
        UserError: the folder holds a quickstart of another seed, or a rehearsal.
    """
    if not path.exists():
        return {"settings": settings, "steps": {}}
    done = json.loads(path.read_text(encoding="utf-8"))
    if done["settings"] != settings:
        from vlm.errors import UserError

        raise UserError(
            f"{path.parent} holds a quickstart with {done['settings']}, not {settings}; "
            "choose another --out or remove the folder"
        )
    return done


def _write(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file at once, so that a kill leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
