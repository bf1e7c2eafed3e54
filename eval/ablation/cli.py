"""Train and score variants of a recipe, and compare accuracy and cost in one table.

vlm ablate RECIPE --vary connector=mlp,pixel_shuffle,perceiver --data test.parquet --out runs/a
vlm ablate RECIPE --vary 'connector=mlp,{type: perceiver, num_queries: 16},[mlp, partial_lora]' ...
vlm ablate RECIPE --vary @eval/ablation/connectors.yaml --seeds 3 ...
vlm ablate RECIPE --vary connector=mlp,kan --vary encoder=runs/a/encoder,runs/b/encoder ...
vlm ablate RECIPE --vary stages.align.training.max_steps=100,200 --seed=3 ...

All variants start from the same base models and see the same records in the same order. Every
other option of the form --a.b=value changes the recipe of all of them. A row that fails is told in
the table and the others go on. The same command goes on where it was stopped; more rows, seeds or
other questions may be asked for in the same folder, which keeps what is done.
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True  # words such as `--a.b value` arrive in `args.overrides`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what varies, what is asked, and where it goes."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see train/recipes/")
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="FIELD=A,B",
        help="what differs between rows; several give all combinations",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="the benchmark's data, as for vlm eval",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for runs, table.md, table.csv and plot.png",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="train each variant with seeds 0 to N - 1 (the recipe's seed)",
    )
    parser.add_argument("--task", default="cv_bench", help="benchmark to score on (cv_bench)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask N questions only")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest reply in tokens (64)"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="how often each variant is timed (15)"
    )
    parser.add_argument(
        "--feature-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep features of frozen encoders in DIR/features where that pays (on)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would run, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet and write the table; 1 if a row failed."""
    from eval.ablation.flow import Request, ablate
    from vlm.errors import UserError

    least = {"seeds": 1, "limit": 1, "max_new_tokens": 1, "rounds": 2}
    for name, number in least.items():
        value = vars(args)[name]
        if value is not None and value < number:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value}; it must be at least {number}")
    score = ["--tasks", args.task, "--data", *map(str, args.data)]
    score += ["--no-blind", "--max-new-tokens", str(args.max_new_tokens)]
    score += [] if args.limit is None else ["--limit", str(args.limit)]
    request = Request(
        recipe=args.recipe,
        overrides=tuple(args.overrides),
        vary=tuple(args.vary),
        seeds=args.seeds,
        task=args.task,
        data=tuple(args.data),
        limit=args.limit,
        score=tuple(score),
        rounds=args.rounds,
        share_features=args.feature_cache,
        out=args.out,
    )
    return ablate(request, dry_run=args.dry_run)
