"""Which options do `vlm data build scenes` and `vlm data build moving-scenes` take?"""

import argparse
from dataclasses import fields
from pathlib import Path

from vlm.errors import UserError


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; every difficulty knob is one."""
    from data_recipes.scenes.layout import Difficulty

    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=10_000, help="scenes to train on")
    parser.add_argument("--test-per-task", type=int, default=1000, help="least questions per task")
    parser.add_argument("--control", type=int, default=1000, help="least control questions")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--direct-share",
        type=float,
        default=0.0,
        help="share of training questions that ask for the letter alone",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; do not change the files")
    knobs = parser.add_argument_group("difficulty")
    for knob in fields(Difficulty):
        option = "--" + knob.name.replace("_", "-")
        knobs.add_argument(option, type=type(knob.default), default=knob.default)


def run_build(args: argparse.Namespace) -> int:
    """Build the scenes and say what was written."""
    from data_recipes.scenes.build import BuildSettings, build
    from data_recipes.scenes.layout import Difficulty

    difficulty = Difficulty(**{f.name: getattr(args, f.name) for f in fields(Difficulty)})
    settings = BuildSettings(
        train=args.train,
        test_per_task=args.test_per_task,
        control=args.control,
        size=args.size,
        seed=args.seed,
        direct_share=args.direct_share,
        difficulty=difficulty,
    )
    if args.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {args.workers}")
    manifest = build(args.out, settings, args.workers)
    counts = manifest["counts"]
    print(
        f"{args.out}: {counts['train']} training scenes, {counts['train_questions']} questions, "
        f"test {sum(counts['test'].values())}, control {sum(counts['control'].values())}"
    )
    return 0


def add_moving_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of moving scenes."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=6000, help="clips to train on (%(default)s)")
    parser.add_argument(
        "--test-per-task", type=int, default=576, help="questions per task (%(default)s)"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the frames in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; do not change the files")


def run_moving(args: argparse.Namespace) -> int:
    """Build moving scenes and say what was written."""
    from data_recipes.scenes.moving_build import MovingSettings, build_moving

    settings = MovingSettings(
        train=args.train, test_per_task=args.test_per_task, size=args.size, seed=args.seed
    )
    if args.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {args.workers}")
    counts = build_moving(args.out, settings, args.workers)["counts"]
    print(f"{args.out}: {counts['train']} training clips, test {sum(counts['test'].values())}")
    return 0
