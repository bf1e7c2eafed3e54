"""Run the stages of a recipe: freeze, train, save, go on where it was stopped.

vlm train train/recipes/quickstart.yaml
vlm train RECIPE --stage align
vlm train RECIPE --output_dir runs/b --stages.align.trainable.connector 2e-3
vlm train RECIPE --check       check recipe and data, print the recipe in full, train nothing
"""

import argparse

TAKES_OVERRIDES = True  # words such as `--a.b value` arrive in `args.overrides`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare RECIPE and --stage; every other option is an override of a field of the recipe."""
    parser.usage = "%(prog)s RECIPE [--stage NAME] [--check] [--dotted.field value ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see train/recipes/")
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone")
    parser.add_argument(
        "--check", action="store_true", help="check, print the recipe in full, and train nothing"
    )
    # The deepspeed launcher adds it; torch takes the rank from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Load the recipe and run it, or only check it."""
    from train.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)  # before the rest, whose import takes seconds

    from train.process import is_lost_peer
    from train.run import check
    from train.run import run as run_recipe
    from vlm.errors import UserError
    from vlm.yaml_values import to_text

    if args.check:
        check(recipe, only=args.stage)
        print(to_text(recipe.to_dict()), end="")
        return 0
    try:
        run_recipe(recipe, only=args.stage)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise UserError(
            "another process of this run has died, so this one ends, too; the same command goes on "
            "from the newest whole checkpoint"
        ) from error
    return 0
