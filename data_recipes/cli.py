"""Build, check and look at data.

vlm data build scenes --help          make a data set of pictures
vlm data build moving-scenes --help   make one of short clips
vlm data check FILE_OR_MIX            read every record, count the faults
vlm data stats FILE_OR_MIX_OR_RECIPE  lengths in tokens, pictures, shares: a table and a picture
vlm data regroup PARQUET OUT          write a parquet file with smaller row groups
vlm data tiles IMAGE --tiling anyres  draw what the encoder sees of an image
"""

import argparse
import importlib

# words -> (module, names of its two functions); imported when chosen, like every command
ACTIONS: dict[str, tuple[str, str, str]] = {
    "build scenes": ("data_recipes.scenes.cli", "add_build_arguments", "run_build"),
    "build moving-scenes": (
        "data_recipes.scenes.cli",
        "add_moving_arguments",
        "run_moving",
    ),
    "check": ("data_recipes.check", "add_arguments", "run"),
    "regroup": ("data_recipes.regroup", "add_arguments", "run"),
    "stats": ("train.data_stats", "add_arguments", "run"),  # by name: it may need a recipe
    "tiles": ("vlm.tiles_view", "add_arguments", "run"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action; its own arguments are parsed when it is known."""
    parser.usage = "%(prog)s {build NAME|check|regroup|stats|tiles} ..."
    parser.add_argument("action", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Import the action's module and run it.

    Raises:
        UserError: there is no such action.
    """
    from connectors.registry import lookup
    from vlm.cli import OneSentenceParser

    action, words = args.action, list(args.arguments)
    if action == "build" and words:
        action = f"build {words.pop(0)}"
    name, add, run_action = lookup("action", action, ACTIONS)
    module = importlib.import_module(name)
    parser = OneSentenceParser(
        prog=f"vlm data {action}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    vars(module)[add](parser)
    return vars(module)[run_action](parser.parse_args(words))
