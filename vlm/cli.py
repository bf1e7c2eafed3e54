"""What does `vlm COMMAND` run? One table of commands, each imported only when it is called.

Every command lives in a module with `add_arguments(parser)` and `run(args) -> int`; those modules
import torch and transformers inside `run`, so that `vlm COMMAND --help` is fast too.
"""

import argparse
import importlib
import sys

from vlm.errors import UserError

# command -> (module, one line of help). The modules reach every part of the suite; nothing else may.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("vlm.quickstart", "from nothing to a trained, scored, chattable model"),
    "train": ("train.cli", "run the stages of a recipe"),
    "data": ("data_recipes.cli", "build, check and look at data"),
    "eval": ("eval.cli", "score a model on benchmark tasks"),
    "chat": ("vlm.chat", "talk to a model about images in the terminal"),
    "base": ("train.base_cli", "make the small base models that the quickstart starts from"),
}

INTERRUPTED = 130  # 128 + SIGINT, what a shell expects


def build_parser() -> argparse.ArgumentParser:
    """Return the top-level parser: names and help lines only, nothing imported."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="vlm",
        description="A vision-language model suite.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`vlm COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    module = importlib.import_module(COMMANDS[args.command][0])
    parser = argparse.ArgumentParser(prog=f"vlm {args.command}", description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(args.arguments))
    except UserError as error:
        print(f"vlm {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nvlm {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
