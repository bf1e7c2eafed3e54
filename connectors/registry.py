"""How is a component found by name? Exact match in one dict, then entry points, else an error."""

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from connectors.errors import UserError

T = TypeVar("T")


def lookup(kind: str, name: str, registry: Mapping[str, T], group: str | None = None) -> T:
    """Return `registry[name]`, or the entry point `name` of `group`.

    Raises:
        UserError: the name is unknown; the message lists the valid names and the nearest one.
    """
    if name in registry:
        return registry[name]
    if group is not None:
        for point in entry_points(group=group, name=name):
            return point.load()
    nearest = difflib.get_close_matches(name, registry, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UserError(f"unknown {kind} {name!r}{hint}; choose from {', '.join(sorted(registry))}")
