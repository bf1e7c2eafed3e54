"""Print and draw lengths by true token count, pictures a record and shares of a mixture.

    vlm data stats train/recipes/quickstart.yaml --stage instruct
    vlm data stats data/mix.yaml --model runs/mine/align --out mix.png

What is counted depends on tokenizer, chat template, tiling and connector: those of the recipe, for
which no weights are loaded, or of a model's folder. `vlm data check` tells what the faults are.
"""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to read, whose tokens to count, and how many records to read."""
    parser.add_argument("data", metavar="FILE_OR_MIX_OR_RECIPE", help="what to read")
    parser.add_argument("--stage", metavar="NAME", help="of a recipe; its last by default")
    parser.add_argument("--model", metavar="FOLDER", help="whose tokens, if no recipe is given")
    parser.add_argument("--image-root", default="", help="folder of image paths")
    parser.add_argument(
        "--limit", type=int, default=10_000, help="records read at most (%(default)s)"
    )
    parser.add_argument("--out", default="data_stats.png", metavar="PNG", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Read, print, draw."""
    from data_recipes.stats import collect, summary, table
    from data_recipes.stats_figure import draw
    from vlm.errors import UserError

    if args.limit < 1:
        raise UserError(f"--limit must be 1 or more, not {args.limit}")
    dataset = open_dataset(args)
    stats = collect(dataset, args.limit)
    print(table(stats, dataset.max_length))
    print(summary(stats))
    draw(stats, Path(args.out), dataset.max_length)
    print(args.out)
    return 0


def open_dataset(args: argparse.Namespace) -> Any:
    """Return the records that the arguments name, with the processor that counts their tokens.

    Raises:
        UserError: neither a recipe nor a model is given, or one that cannot be read.
    """
    from data_recipes.dataset import ConversationDataset
    from data_recipes.mixture import Source, is_mix, load_mix
    from vlm.errors import UserError
    from vlm.loading import check_checkpoint
    from vlm.processing import VlmProcessor

    path = Path(args.data)
    if _is_recipe(path):
        return recipe_dataset(args.data, args.stage)
    if args.model is None:
        raise UserError("--model FOLDER is needed to count tokens, unless a recipe is given")
    check_checkpoint(args.model)
    source = Source(name=path.name, path=str(path), image_root=args.image_root)
    sources = load_mix(path, args.image_root) if is_mix(path) else [source]
    return ConversationDataset(sources, VlmProcessor.from_pretrained(args.model))


def recipe_dataset(recipe_file: str, stage_name: str | None) -> Any:
    """Return the records of a recipe's stage.

    Raises:
        UserError: no such stage, one that does not learn the next token, or no tokenizer.
    """
    from train.data import stage_dataset
    from train.objectives import NextToken
    from train.planning.skeleton import build_skeleton
    from train.recipe import load_recipe
    from vlm.chat_templates import load
    from vlm.errors import UserError
    from vlm.long_context import context_length

    recipe = load_recipe(recipe_file)
    stage = recipe.stages[-1] if stage_name is None else recipe.stage(stage_name)
    if not isinstance(stage.aim, NextToken):
        raise UserError(f"stages.{stage.name}: only stages that learn the next token have rows")
    skeleton = build_skeleton(recipe.model)
    processor = skeleton.processor
    if processor is None:
        raise UserError(f"the tokenizer of the model in {recipe_file} is not on this machine")
    if stage.chat_template is not None:
        processor.chat_template = load(stage.chat_template)
    positions = context_length(skeleton.model.config.text_config)
    return stage_dataset(stage, processor, recipe.seed, positions)


def _is_recipe(path: Path) -> bool:
    """Return whether a file is YAML with stages."""
    from vlm.yaml_values import read_file

    if path.suffix not in (".yaml", ".yml"):
        return False
    tree = read_file(path)
    return isinstance(tree, dict) and "stages" in tree
