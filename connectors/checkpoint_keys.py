"""How do a connector's weights get from a published checkpoint's names to ours, and back?"""

from collections.abc import Mapping

from torch import Tensor

from connectors.base import Connector
from connectors.errors import UserError
from connectors.registry import lookup


def from_published(connector: Connector, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the connector's state dict out of a published checkpoint's.

    The format is recognised by its keys, whatever stands before them (`model.mm_projector.0.weight`
    and `mm_projector.0.weight` are one); keys of the rest of the model are passed over. The result
    is complete: load it with `connector.load_state_dict(result)`.

    Raises:
        UserError: no known format fits, a weight is missing or left over, or a shape differs.
    """
    tables = type(connector).key_tables(connector.config)
    name = type(connector).__name__
    for table in tables.values():
        found = _keys_under(_root(table), state)
        if not found:
            continue
        if wrong := sorted(set(found) ^ set(table)):
            raise UserError(
                f"the checkpoint's connector does not fit {name} with {connector.config}: "
                f"{', '.join(wrong)} stand only in one of the two"
            )
        own = {table[theirs]: state[key] for theirs, key in found.items()}
        _check_shapes(connector, own)
        return own
    raise UserError(
        f"the checkpoint holds no connector that {name} with {connector.config} knows; "
        f"it looks for keys under {', '.join(sorted(map(_root, tables.values()))) or 'none'}"
    )


def to_published(connector: Connector, format_name: str) -> dict[str, Tensor]:
    """Return the connector's weights under the keys of the published format `format_name`.

    Raises:
        UserError: the connector has no such format.
    """
    tables = type(connector).key_tables(connector.config)
    table = lookup(f"checkpoint format of {type(connector).__name__}", format_name, tables)
    state = connector.state_dict()
    return {theirs: state[ours] for theirs, ours in table.items()}


def _root(table: Mapping[str, str]) -> str:
    """Return the dotted names that all published keys of one format begin with, and a dot."""
    first, last = (key.split(".") for key in (min(table), max(table)))
    count = 0
    while count < len(first) - 1 and first[count] == last[count]:
        count += 1
    return ".".join(first[:count]) + "."


def _keys_under(root: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {published key, begun at `root`: key in the checkpoint}."""
    found = {}
    for key in state:
        before, here, rest = key.partition(root)
        if here and (not before or before.endswith(".")):
            found[root + rest] = key
    return found


def _check_shapes(connector: Connector, own: Mapping[str, Tensor]) -> None:
    """Refuse weights made for other widths, with both shapes."""
    for name, expected in connector.state_dict().items():
        if own[name].shape != expected.shape:
            raise UserError(
                f"the checkpoint's connector weight for {name!r} has shape "
                f"{tuple(own[name].shape)}, but this vision encoder and language model need "
                f"{tuple(expected.shape)}"
            )
