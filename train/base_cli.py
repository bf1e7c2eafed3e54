"""Make one of the quickstart's base models: an encoder from pictures, a language model from text.

vlm base encoder --out runs/quickstart/base/encoder
vlm base language-model --out runs/quickstart/base/language_model --steps 2000
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True  # words such as `--steps 100` arrive in `args.overrides`
RECIPES = Path(__file__).parent / "recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is made, where, and by which recipe; every other option is an override."""
    parser.add_argument("part", choices=["encoder", "language-model"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--recipe", type=Path, help="another recipe than the shipped one")


def run(args: argparse.Namespace) -> int:
    """Make the base model; a finished one is found and kept."""
    from train.base import encoder, language_model
    from train.base.settings import load_settings

    path = args.recipe or RECIPES / f"base-{args.part}.yaml"
    if args.part == "encoder":
        settings = load_settings(encoder.EncoderSettings, path, args.overrides)
        report = encoder.train_encoder(settings, args.out)
    else:
        settings = load_settings(language_model.LanguageModelSettings, path, args.overrides)
        report = language_model.train_language_model(settings, args.out)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in report["held_out"].items())
    print(f"{args.out}: {report['parameters']:,} parameters; held out: {figures}")
    return 0
