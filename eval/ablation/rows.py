"""Which rows does an ablation have? The words of `--vary` in, named changes of a recipe out.

connector=mlp,perceiver                          names: the connectors with their defaults
connector=mlp,{type: perceiver, num_queries: 16},[mlp, partial_lora]
encoder=runs/a/encoder,clip-l-336                folders of saved encoders, or presets
stages.align.training.max_steps=100,200          any field of the recipe
@eval/ablation/connectors.yaml                   a file: name of the row -> its changes
@eval/ablation/connectors.yaml:mlp,sva           these rows of the file

What stands behind `=` is a YAML list without its brackets. Several `--vary` give all combinations.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.registry import lookup
from vlm.errors import UserError
from vlm.yaml_values import parse_value, read_file

# Fields of a recipe that tell runs apart, not variants.
OWN = {"name": "--out", "output_dir": "--out", "seed": "--seeds"}
SHORT = {"connector": "model.connector", "encoder": "model.vision_encoder"}


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        name: what the table calls it.
        changes: dotted field of the recipe -> value.
    """

    name: str
    changes: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Return the name as a folder can have it."""
        return re.sub(r"[^\w.=+-]+", "-", self.name).strip("-.")


def rows_of(words: Sequence[str]) -> list[Row]:
    """Return the rows of all `--vary` words, the first `--vary` varying slowest.

    Raises:
        UserError: a word cannot be read, or two rows are the same.
    """
    rows = []
    for parts in itertools.product(*(_axis(word) for word in words)):
        changes: dict[str, Any] = {}
        for part in parts:
            for key, value in part.changes.items():
                if key in OWN:
                    raise UserError(f"--vary cannot change {key}; see {OWN[key]}")
                if key in changes:
                    raise UserError(f"two --vary change {key}; give its values to one of them")
                changes[key] = value
        rows.append(Row(", ".join(part.name for part in parts), changes))
    for first, second in itertools.combinations(rows, 2):
        if first.changes == second.changes:
            raise UserError(f"the rows {first.name!r} and {second.name!r} are the same variant")
        if first.folder.lower() == second.folder.lower():
            raise UserError(
                f"two different rows are called {first.name!r}; give them names in a file, "
                "see `vlm ablate --help`"
            )
    return rows


def _axis(word: str) -> list[Row]:
    """Return the choices of one `--vary`."""
    if word.startswith("@"):
        path, _, names = word[1:].partition(":")
        rows = {row.name: row for row in _file(Path(path))}
        chosen = names.split(",") if names else rows
        return [lookup(f"row of {path}", name, rows) for name in chosen]
    key, equals, text = word.partition("=")
    if not equals or not key or not text.strip():
        raise UserError(
            f"--vary {word!r} is not understood; it looks like connector=mlp,perceiver or @FILE"
        )
    values = parse_value(f"[{text}]", f"--vary {key}")
    field = long_name(key)
    labels = [_label(field, value) for value in values]
    if field == SHORT["encoder"]:
        ends = distinct_ends([value for value in values if isinstance(value, str)])
        labels = [ends.get(label, label) for label in labels]
    return [
        Row(label, {field: _complete(field, value)})
        for label, value in zip(labels, values, strict=True)
    ]


def distinct_ends(paths: Sequence[str]) -> dict[str, str]:
    """Return path -> what tells it from the others: {"runs/a/encoder": "a", "runs/b/encoder": "b"}.

    A single path, or a name without folders, is called by its last part.
    """
    parts = {path: Path(path).parts for path in paths}
    while len(parts) > 1 and len({each[-1] for each in parts.values()}) == 1:
        if any(len(each) == 1 for each in parts.values()):
            break
        parts = {path: each[:-1] for path, each in parts.items()}
    length = 1
    while len({each[-length:] for each in parts.values()}) < len(parts):
        length += 1
    return {path: "/".join(each[-length:]) for path, each in parts.items()}


def _file(path: Path) -> list[Row]:
    """Return the rows of a file of variants, name -> {field: value}."""
    tree = read_file(path)
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path} must be a mapping from names of rows to their changes")
    rows = []
    for name, changes in tree.items():
        if not isinstance(changes, dict) or not changes:
            raise UserError(
                f"{path}: {name} must be a mapping of fields to change, such as "
                f"{{connector: {{type: mlp}}}}, not {changes!r}"
            )
        full = {long_name(str(key)): value for key, value in changes.items()}
        rows.append(Row(str(name), {key: _complete(key, value) for key, value in full.items()}))
    return rows


def long_name(key: str) -> str:
    """Return the recipe's dotted field that `connector`, `encoder.layer`, ... stand for."""
    first, dot, rest = key.partition(".")
    return SHORT.get(first, first) + dot + rest


def _complete(field: str, value: Any) -> Any:
    """Return the value as a recipe has it: names become mappings."""
    if field == SHORT["connector"]:
        if isinstance(value, list):
            return [{"type": item} if isinstance(item, str) else item for item in value]
        return {"type": value} if isinstance(value, str) else value
    if field == SHORT["encoder"] and isinstance(value, str):
        return {"source": value} if Path(value).is_dir() else {"preset": value}
    return value


def _label(field: str, value: Any) -> str:
    """Return a short name for one value of a field."""
    if field == SHORT["connector"]:
        items = value if isinstance(value, list) else [value]
        return "+".join(_component(item) for item in items)
    if field == SHORT["encoder"]:
        return _component(value)
    return f"{field.rpartition('.')[2]}={_flat(value)}"


def _component(value: Any) -> str:
    """Return "perceiver(num_queries=16)" for {type: perceiver, num_queries: 16}."""
    if not isinstance(value, Mapping):
        return str(value)
    named = dict(value)
    name = next((named.pop(key) for key in ("type", "preset") if key in named), "")
    settings = ", ".join(f"{key}={_flat(item)}" for key, item in named.items())
    return f"{name}({settings})" if settings else str(name)


def _flat(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, (list, Mapping)) else str(value)
