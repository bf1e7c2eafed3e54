"""What does `vlm COMMAND` run? One table of commands, each imported only when it is called.

Every command is a module with `add_arguments(parser)` and `run(args) -> int`. It imports torch,
transformers and what needs them inside `run`, so that `vlm COMMAND --help` answers at once too. A
module that says `TAKES_OVERRIDES = True` finds the words that its parser does not know, such as
`--a.b value`, in `args.overrides`.

Exit codes: 0 done; 2 the user can mend it, one sentence on stderr says how; 130 interrupted; 141
the reader of our output went away. Anything else is a fault of ours and shows its traceback.
"""

import argparse
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """One line of the table."""

    module: str
    help: str
    resumes: bool = False  # called again after an interruption, it goes on where it was


# The modules reach every part of the suite; no other table does.
COMMANDS: dict[str, Command] = {
    "quickstart": Command("vlm.quickstart", "from nothing to a trained, chattable model", True),
    "train": Command("train.cli", "run the stages of a recipe", True),
    "plan": Command("train.planning.cli", "tell what a run will need: memory, tokens, hours"),
    "data": Command("data_recipes.cli", "build, check and look at data"),
    "eval": Command("eval.cli", "score a model on benchmark tasks", True),
    "ablate": Command("eval.ablation.cli", "compare variants of a recipe in one table", True),
    "merge": Command("vlm.merge", "make a plain checkpoint of one with an adapter"),
    "chat": Command("vlm.chat", "talk to a model about images and videos in the terminal"),
    "demo": Command("demo.cli", "talk to a model about images in a web page"),
    "base": Command("train.base_cli", "make the small base models of the quickstart", True),
}

# Packages that are not in the core install -> the extra of pyproject.toml that brings them.
EXTRAS: dict[str, str] = {
    "open_clip": "open_clip",
    "deepspeed": "train",
    "bitsandbytes": "train",
    "trl": "train",
    "peft": "train",
    "datasets": "eval",
    "gradio": "demo",
    "av": "video",
}

USER_ERROR = 2
INTERRUPTED = 128 + 2  # SIGINT, what a shell expects
READER_GONE = 128 + 13  # SIGPIPE

# Faults of the machine that the user can mend; every other OSError is a bug until shown otherwise.
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class OneSentenceParser(argparse.ArgumentParser):
    """A parser that complains in one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, as argparse does."""
        self.exit(USER_ERROR, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the top-level parser: names and help lines only, nothing imported."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    parser = OneSentenceParser(
        prog="vlm",
        usage="vlm [-h] [--version] COMMAND ...",
        description="A vision-language model suite.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`vlm COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vlm {version('vlm-suite')}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where a reader that went away is still our business
    except BrokenPipeError:
        # `vlm ... | head`: whatever is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _run(argv: Sequence[str]) -> int:
    """Find the command, parse its words, run it, and say in one sentence what the user can mend."""
    parser = build_parser()
    chosen = parser.parse_args(argv)
    name = chosen.command
    if name is None:
        parser.print_help(sys.stderr)
        return USER_ERROR
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        return _complain(
            "vlm", f"unknown command {name!r}{hint}; choose from {', '.join(COMMANDS)}"
        )
    program = f"vlm {name}"
    try:
        module = importlib.import_module(COMMANDS[name].module)
        return module.run(_parse(program, module, chosen.arguments))
    except BrokenPipeError:
        raise  # to `main`
    except Exception as error:
        sentence = _mendable(error)
        if sentence is None:
            raise
        return _complain(program, sentence)
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if COMMANDS[name].resumes else ""
        print(f"\n{program}: interrupted{again}", file=sys.stderr)
        return INTERRUPTED


def _mendable(error: Exception) -> str | None:
    """Return the sentence for a fault that the user can mend; None for a bug."""
    from vlm.errors import UserError  # not at the top: it comes with the connectors, and torch

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(package)
        return extra and f"{package} is not installed; it comes with: make extras EXTRAS={extra}"
    if isinstance(error, OSError) and error.errno in MENDABLE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room, or choose a folder that can be written"
    return None


def _parse(program: str, module: ModuleType, words: Sequence[str]) -> argparse.Namespace:
    """Parse the command's own words; unknown ones are its overrides, or an error.

    Raises:
        SystemExit: `--help` (0), or words that do not fit (2), as argparse does.
    """
    parser = OneSentenceParser(
        prog=program,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, unknown = parser.parse_known_args(words)
    if "TAKES_OVERRIDES" in vars(module):
        args.overrides = unknown
    elif unknown:
        parser.error(_unknown_words(parser, unknown))
    return args


def _unknown_words(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """Return what to say of words that the command does not take, with the option meant."""
    word = unknown[0].partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(word, options, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"unknown argument {word!r}{hint}"


def _complain(program: str, sentence: str) -> int:
    print(f"{program}: {sentence}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
