"""Run the stages of a recipe: freeze, train, save, go on where it was stopped.

vlm train train/recipes/quickstart.yaml
vlm train RECIPE --stage align
vlm train RECIPE --output_dir runs/b --stages.align.trainable.connector 2e-3
"""

import argparse

TAKES_OVERRIDES = True  # words such as `--a.b value` arrive in `args.overrides`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare RECIPE and --stage; every other option is an override of a field of the recipe."""
    parser.usage = "%(prog)s RECIPE [--stage NAME] [--dotted.field value ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see train/recipes/")
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone")
    # The deepspeed launcher adds it; torch takes the rank from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Load the recipe and run it."""
    from train.recipe import load_recipe
    from train.run import run as run_recipe

    run_recipe(load_recipe(args.recipe, args.overrides), only=args.stage)
    return 0
