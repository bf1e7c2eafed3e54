"""Which options does `vlm base` take? encoder or language-model, a recipe, a folder, overrides."""

import argparse
from pathlib import Path

from vlm.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("part", choices=["encoder", "language-model"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--recipe", type=Path, help="another recipe than the shipped one")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="such as --steps 100")


def run(args: argparse.Namespace) -> int:
    """Make one base model; a finished one is found and kept."""
    from train.base import encoder, language_model
    from train.base.settings import load_settings

    path = args.recipe or RECIPES / f"base-{args.part}.yaml"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.part == "encoder":
            settings = load_settings(encoder.EncoderSettings, path, args.overrides)
            report = encoder.train_encoder(settings, args.out)
        else:
            settings = load_settings(language_model.LanguageModelSettings, path, args.overrides)
            report = language_model.train_language_model(settings, args.out)
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}") from error
    figures = ", ".join(f"{name} {value:.3f}" for name, value in report["held_out"].items())
    print(f"{args.out}: {report['parameters']:,} parameters; held out: {figures}")
    return 0
