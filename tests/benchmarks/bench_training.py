"""How fast and how lean is training against transformers, with equal losses? Tables, on one thread.

    python tests/benchmarks/bench_training.py                # both shapes
    python tests/benchmarks/bench_training.py --shape 1 --steps 10 --rounds 3

Theirs is `LlavaNextForConditionalGeneration` with its processor, a collator that pads and
transformers' Trainer; ours is a recipe (training_sides.py). Each side runs in a process of its own,
theirs and ours in turn; a step's time is the least of the rounds, and the first step is left out.
Times are CPU seconds, which other users of the machine disturb less, and seconds on the clock.
Losses that are not equal end the comparison.

Memory is the peak of the resident set in the steps, above what the process held before it had a
model. The floor is what our third step cannot do without: its matrix products and attention, run
once more by themselves, and AdamW's pass over the parameters.
"""

import vlm  # noqa: F401  # isort: skip - before transformers: it mends torchvision's import

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from training_floor import Products
from training_sides import Measured, Shape, prepare, train_ours
from training_theirs import train_theirs
from transformers import TrainerCallback

TOLERANCE = 1e-5  # of losses, relative
WATCHED = 2  # the step whose floor is measured, from 0
SHAPES = {
    "0": Shape(  # in seconds, to see that the command works
        hidden_size=64, intermediate_size=256, num_layers=2, vocab_size=3000, batch_size=2
    ),
    "1": Shape(
        hidden_size=320, intermediate_size=1280, num_layers=8, vocab_size=152000, batch_size=4
    ),
    # Qwen2-0.5B at half its width and depth, with a quarter of its words; LLaVA-1.5's batch
    "2": Shape(
        hidden_size=448, intermediate_size=2432, num_layers=12, vocab_size=38000, batch_size=16
    ),
}


class Watch(TrainerCallback):
    """Notes the products of one step, and how long AdamW takes in each."""

    def __init__(self) -> None:
        self.products = Products()
        self.optimizer: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Look on from here."""
        if state.global_step == WATCHED:
            self.products.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """End the look before the optimizer."""
        if state.global_step == WATCHED:
            self.products.__exit__(None, None, None)
        self.start = time.process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note AdamW's time."""
        self.optimizer.append(time.process_time() - self.start)


def child(side: str, shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """Run one side; meant for a process of its own."""
    if side == "prepare":
        prepare(shape, folder, steps)
        return {}
    if side == "theirs":
        return asdict(train_theirs(shape, folder, steps))
    if side == "ours":
        return asdict(train_ours(shape, folder, steps))
    watch = Watch()
    train_ours(shape, folder, WATCHED + 1, watch)
    return {"products": watch.products.replay(), "optimizer": min(watch.optimizer)}


def run(side: str, name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run one side in a process and return what it measured."""
    words = [sys.executable, __file__, "--side", side, "--shape", name]
    words += ["--folder", str(folder), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_losses(theirs: Measured, ours: Measured) -> None:
    """Print both sides' losses; end here if they differ."""
    print("| step | their loss | our loss |\n|---|---|---|")
    for step, (a, b) in enumerate(zip(theirs.losses, ours.losses, strict=True), start=1):
        print(f"| {step} | {a:.6f} | {b:.6f} |")
        if abs(a - b) > TOLERANCE * abs(a):
            sys.exit(f"the losses of step {step} are {a!r} and {b!r}: these are not the same model")


def least(rounds: list[Measured], name: str) -> list[float]:
    """Return each step's least value over the rounds."""
    return [min(values) for values in zip(*(asdict(r)[name] for r in rounds), strict=True)]


def compare(name: str, folder: Path, steps: int, rounds: int) -> None:
    """Measure one shape and print its tables."""
    shape = SHAPES[name]
    run("prepare", name, folder, steps)
    sides: dict[str, list[Measured]] = {"theirs": [], "ours": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(Measured(**run(side, name, folder, steps)))
            check = sides["theirs"][0].losses[: len(found[-1].losses)]
            assert len(check) == steps, "a loss of every step"
    theirs, ours = sides["theirs"][0], sides["ours"][0]
    print(f"\nShape {name}: {shape}\n")
    check_losses(theirs, ours)
    tokens, padding = sum(theirs.tokens[1:]), sum(theirs.padding) / len(theirs.padding)
    share = sum(theirs.tokens) / sum(theirs.places)
    print(f"\n{tokens} supervised tokens, {share:.0%} of all places; padding {padding:.0%}\n")
    print("| | transformers | ours | ratio |\n|---|---|---|---|")
    for title, key in (("CPU", "cpu_seconds"), ("clock", "wall_seconds")):
        seconds = [sum(least(found, key)[1:]) for found in sides.values()]
        a, b = (tokens / s for s in seconds)
        print(f"| supervised tokens per second ({title}) | {a:.1f} | {b:.1f} | {b / a:.2f} |")
    a, b = (max(r.peak_bytes for r in found) / 1e6 for found in sides.values())
    print(f"| peak memory, MB | {a:.0f} | {b:.0f} | {b / a:.2f} |")
    waits = [
        sum(least(found, "waited")[1:]) / sum(least(found, "wall_seconds")[1:])
        for found in sides.values()
    ]
    print(f"| waiting for the loader | {waits[0]:.1%} | {waits[1]:.1%} | |\n")
    floor = run("floor", name, folder, steps)
    step = least(sides["ours"], "cpu_seconds")[WATCHED]
    products, optimizer = floor["products"], floor["optimizer"]
    rest = step - products - optimizer
    print(f"Our step {WATCHED + 1}: {step:.2f} CPU seconds = {products:.2f} products and attention")
    print(f"+ {optimizer:.2f} AdamW + {rest:.2f} for all else; transformers takes ", end="")
    print(f"{least(sides['theirs'], 'cpu_seconds')[WATCHED]:.2f}.", flush=True)


def main() -> None:
    """Compare, or run one side for the process that compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side:
        print(json.dumps(child(args.side, SHAPES[args.shape], args.folder, args.steps)))
        return
    print(f"{platform.node()}, {cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"torch {torch.__version__}, one thread, float32")
    for name in ["1", "2"] if args.shape is None else [args.shape]:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, Path(folder), args.steps, args.rounds)


def cpu_name() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
