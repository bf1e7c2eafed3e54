"""How is YAML read here? As YAML, but `1e-3` is a number, as everybody who writes recipes expects.

YAML 1.1, which PyYAML follows, wants `1.0e-3` and reads `1e-3` as text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads floats without a point or with an unsigned exponent."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_value(text: str, where: str) -> Any:
    """Read one value as written on a command line or a whole document.

    Raises:
        UserError: the text is no YAML; the sentence starts with `where`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is no YAML ({' '.join(str(error).split())})") from error


def read_file(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: it cannot be read or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    return parse_value(text, str(path))


def to_text(tree: Any) -> str:
    """Write a tree of plain values as YAML, keys in their order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
