"""Score a model on benchmark tasks: `vlm eval MODEL --tasks cv_bench --data FILE... --out DIR`.

Writes DIR/samples.jsonl (every answer), results.json and report.md. A run that was stopped goes on
with the same command. `vlm eval --list` names tasks, protocols and strategies.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.protocols import Protocol
    from eval.settings import AnswerSettings
    from eval.task import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; nothing heavy is imported for it."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a saved model's folder or hub id"
    )
    parser.add_argument("--list", action="store_true", help="list tasks, protocols and strategies")
    parser.add_argument("--tasks", default="cv_bench", help="names, comma-separated (cv_bench)")
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="FILE",
                        help="the task's data, e.g. test_2d.parquet test_3d.parquet")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for answers and reports")
    parser.add_argument("--protocol", default="official", help="wording of the prompt (official)")
    parser.add_argument("--strategy", default="reason",
                        help="when letters are scored: reason or direct (reason)")  # fmt: skip
    parser.add_argument("--score", default="likelihood,generation",
                        help="how: likelihood, generation or both (both)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N",
                        help="ask N questions only, taken evenly from every group")  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="questions at a time (64)"
    )
    parser.add_argument("--blind", action=argparse.BooleanOptionalAction, default=True,
                        help="also ask without the picture, as a baseline (on)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N",
                        help="longest reply in tokens (128)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the weights (as saved)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (cuda if there is one)")
    parser.add_argument(
        "--check", action="store_true", help="look at options and data, and score nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Score the model, print the table, and say where the report is."""
    from vlm.errors import UserError  # its package imports torch, which --help can do without

    if args.list:
        print(_listing())
        return 0
    if args.model is None and not args.check:
        raise UserError("which model? `vlm eval MODEL ...` takes a saved model's folder")
    if args.out is None and not args.check:
        raise UserError("where to? `--out DIR` names the folder for answers and reports")
    for name, value in (("limit", args.limit), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if args.check:
        _open(args)
        return 0
    return _score(args)


def _open(args: argparse.Namespace) -> "tuple[AnswerSettings, Protocol, list[Task]]":
    """Return what is asked, how it is worded and the tasks, their data opened.

    Raises:
        UserError: an option is wrong, or a file of the data.
    """
    from connectors.registry import lookup
    from eval.protocols import PROTOCOLS
    from eval.settings import AnswerSettings
    from eval.tasks import TASKS
    from vlm.loading import usable_device

    settings = AnswerSettings(
        strategy=args.strategy,
        scorings=tuple(dict.fromkeys(args.score.split(","))),
        max_new_tokens=args.max_new_tokens,
    )
    protocol = lookup("protocol", args.protocol, PROTOCOLS)
    names = list(dict.fromkeys(args.tasks.split(",")))
    classes = [lookup("task", name, TASKS, "vlm.tasks") for name in names]
    usable_device(args.device)
    return settings, protocol, [found.open(args.data) for found in classes]


def _score(args: argparse.Namespace) -> int:
    """Open the data before the model: a wrong file name should not cost a loading time."""
    from eval.answering import ModelAnswerer
    from eval.harness import evaluate
    from eval.report import console_table
    from eval.runner import BLIND, IMAGE, RunPlan, choose_indices
    from vlm.done import make_folder
    from vlm.loading import load_model

    settings, protocol, tasks = _open(args)
    make_folder(args.out)
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    answerer = ModelAnswerer(model, processor, settings)
    about = {"model": str(args.model), "dtype": str(model.dtype), "device": str(model.device)}
    for task in tasks:
        folder = args.out if len(tasks) == 1 else args.out / task.name
        plan = RunPlan(
            protocol=protocol,
            indices=choose_indices(task, args.limit),
            views=(IMAGE, BLIND) if args.blind else (IMAGE,),
            batch_size=args.batch_size,
        )
        with _Progress(task.name) as progress:
            results = evaluate(task, answerer, settings, plan, folder, about, progress.messages)
        print(f"{console_table(results)}\nreport: {folder / 'report.md'}")
    return 0


class _Progress:
    """A progress bar on stderr, with sentences printed above it."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        from eval.harness import Messages

        # disable=None: no bar where stderr is no terminal
        self._bar = tqdm(desc=name, unit="answer", disable=None)
        self.messages = Messages(say=self._say, progress=self._advance)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _say(self, sentence: str) -> None:
        self._bar.write(f"vlm eval: {sentence}", file=sys.stderr)

    def _advance(self, new: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(new)


def _listing() -> str:
    from eval.protocols import PROTOCOLS
    from eval.settings import STRATEGIES
    from eval.tasks import TASKS

    parts = {
        "tasks": {name: task.summary for name, task in TASKS.items()},
        "protocols": {name: protocol.summary for name, protocol in PROTOCOLS.items()},
        "strategies": STRATEGIES,
    }
    lines = []
    for title, entries in parts.items():
        width = max(map(len, entries))
        lines += [f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in entries.items())]
    return "\n".join(lines)
