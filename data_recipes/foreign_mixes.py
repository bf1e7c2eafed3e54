"""How do other suites list what they train on? LLaVA-NeXT's YAML and InternVL's JSON, as sources.

LLaVA-NeXT (train.py, `LazySupervisedDataset`):

    datasets:
      - {json_path: /data/{a,b}.json, sampling_strategy: "first:10%"}

`all`, `first:N`, `end:N` and `random:N`, N a number or a percentage, which rounds up. Ours draws
`random` from the seed and the source, the same on every rank; theirs from whatever came before.
Placeholders move to the front of their turn, as theirs do.

InternVL (internvl_chat_finetune.py, `build_datasets`):

    {"name": {"root": "images/", "annotation": "a.jsonl", "repeat_time": 2, "data_augment": false}}

A `repeat_time` below 1 takes the first part of the file (ours rounds up, theirs down). A picture
without a placeholder comes first, as theirs does. `length` is not needed; what we do not have
(`data_augment: true`, `max_dynamic_patch`) is refused.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from vlm.errors import UserError

TAKES = ("first", "end", "random")
NEXT_KEYS = {"json_path", "sampling_strategy"}
INTERNVL_KEYS = {"root", "annotation", "data_augment", "repeat_time", "length"}


def from_llava_next(datasets: Any, where: str) -> list[dict[str, Any]]:
    """Return the fields of a source for each entry of LLaVA-NeXT's `datasets`.

    Raises:
        UserError: an entry has other keys, or a strategy that cannot be read.
    """
    if not isinstance(datasets, list):
        raise UserError(f"{where}: datasets must be a list, not {datasets!r}")
    names: list[str] = []
    sources = []
    for number, entry in enumerate(datasets, start=1):
        place = f"{where}: datasets {number}"
        _check_keys(entry, NEXT_KEYS, "json_path", place)
        path = str(entry["json_path"])
        names.append(_new_name(PurePath(path).stem, names))
        strategy = _strategy(entry.get("sampling_strategy", "all"), place)
        sources.append({"name": names[-1], "path": path, "image_position": "first", **strategy})
    return sources


def from_internvl(tree: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the fields of a source for each entry of InternVL's meta file.

    Raises:
        UserError: an entry has other keys, or asks for what is not done here.
    """
    return [_internvl_source(str(name), tree[name], f"{where}: {name}") for name in tree]


def is_internvl(tree: Any) -> bool:
    """Return whether a tree maps names to mappings with an `annotation`."""
    return isinstance(tree, Mapping) and any(
        isinstance(entry, Mapping) and "annotation" in entry for entry in tree.values()
    )


def _internvl_source(name: str, entry: Any, where: str) -> dict[str, Any]:
    _check_keys(entry, INTERNVL_KEYS, "annotation", where)
    if entry.get("data_augment", False) is not False:
        raise UserError(f"{where}: data_augment is not done here; set it to false")
    source: dict[str, Any] = {
        "name": name,
        "path": str(entry["annotation"]),
        "image_root": str(entry.get("root", "")),
        "image_position": "front_if_missing",
    }
    times = entry.get("repeat_time", 1)
    if isinstance(times, bool) or not isinstance(times, (int, float)) or times <= 0:
        raise UserError(f"{where}: repeat_time must be a number above 0, not {times!r}")
    if times < 1:
        return source | {"cap": f"{100 * times:.10g}%"}
    if times != int(times):
        raise UserError(f"{where}: a repeat_time above 1 must be a whole number, not {times}")
    return source | {"repeat": float(times)}


def _strategy(text: Any, where: str) -> dict[str, Any]:
    """Return cap and take of a sampling strategy."""
    if text == "all":
        return {}
    take, colon, amount = str(text).partition(":")
    if not colon or take not in TAKES or not amount.removesuffix("%").isdigit():
        raise UserError(
            f"{where}: sampling_strategy must be all, or one of {', '.join(TAKES)} with a number "
            f"or a percentage such as first:10%, not {text!r}"
        )
    return {"take": take, "cap": amount if amount.endswith("%") else int(amount)}


def _check_keys(entry: Any, known: set[str], needed: str, where: str) -> None:
    if not isinstance(entry, Mapping) or needed not in entry:
        raise UserError(f"{where} must be a mapping with the key {needed}, not {entry!r}")
    if unknown := sorted(set(map(str, entry)) - known):
        raise UserError(f"{where}: {unknown[0]!r} is not read here; remove it")


def _new_name(name: str, taken: list[str]) -> str:
    """Return a name, with a number behind it where it is taken."""
    number = 2
    found = name
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found
