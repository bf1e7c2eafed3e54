"""How do other harnesses read a reply? Their rules, only to reproduce their published numbers.

Both read the first letter of a word where no option letter stands ("door" becomes D), and both
take the first of several letters. Our own reading is `vlm.answers.read_answer`.
"""

import re
from collections.abc import Callable, Sequence

from vlm.answers import LETTERS


def read_as_cambrian(reply: str, choices: Sequence[str]) -> str | None:
    """Follow Cambrian-1 539ffc3 eval/eval/ade/ade_test.py:21-31.

    The text after the last "answer is" or "answer:", lower-cased, without brackets and full stops:
    its first character is the letter.
    """
    text = re.split(r"answer is|answer:", reply.lower())[-1]
    text = re.sub(r"[().]", "", text).strip()
    return _option(text[:1].upper(), choices)


def read_as_lmms_eval(reply: str, choices: Sequence[str]) -> str | None:
    """Follow lmms-eval 75571cf tasks/cv_bench/utils.py:20-24: the reply's first letter."""
    match = re.match(r"[(\s]*([A-Za-z])", reply)
    return _option(match[1].upper(), choices) if match else None


def _option(letter: str, choices: Sequence[str]) -> str | None:
    return letter if letter and letter in LETTERS[: len(choices)] else None


FOREIGN_PARSERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "cambrian": read_as_cambrian,
    "lmms": read_as_lmms_eval,
}
