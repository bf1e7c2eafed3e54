"""How does `--stages.align.trainable.connector 2e-3` change a recipe before it is checked?"""

import difflib
from collections.abc import Sequence
from typing import Any

from vlm.errors import UserError
from vlm.yaml_values import parse_value


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `--a.b value` and `--a.b=value` into {"a.b": value}.

    Raises:
        UserError: a word is no option, or an option has no value.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"{word!r} is not understood; overrides look like --output_dir runs/a")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} has no value; write --{name} VALUE")
            value = rest.pop(0)
        found[name] = parse_value(value, f"--{name}")
    return found


def apply_overrides(tree: Any, overrides: dict[str, Any]) -> None:
    """Set every dotted path of `overrides` in `tree`; list entries are addressed by their name.

    Raises:
        UserError: the path leads through something that is no mapping, or names no entry.
    """
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        node = tree
        for depth, key in enumerate(parents):
            node = _step(node, key, "--" + ".".join(parents[: depth + 1]))
        if isinstance(node, list):
            node[_entry(node, last, f"--{dotted}")] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise UserError(f"--{dotted}: {'.'.join(parents)} is {node!r} and has no fields")


def _step(node: Any, key: str, where: str) -> Any:
    """Return the child `key`, made as a mapping where there is none yet."""
    if isinstance(node, list):
        return node[_entry(node, key, where)]
    if not isinstance(node, dict):
        raise UserError(f"{where}: {node!r} has no fields")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _entry(entries: list, name: str, where: str) -> int:
    """Return the position of the entry called `name` (stages and data sources have names)."""
    names = [str(entry.get("name")) if isinstance(entry, dict) else "" for entry in entries]
    if name in names:
        return names.index(name)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UserError(f"{where}: there is no {name!r}{hint}; the names are {', '.join(names)}")
