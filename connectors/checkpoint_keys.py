"""How do a connector's weights get from a published checkpoint's names to ours, and back?"""

from collections.abc import Mapping

from torch import Tensor

from connectors.base import Connector
from connectors.errors import UserError
from connectors.key_table import KeyTable, Layout
from connectors.registry import lookup

Table = Mapping[str, str | Layout]


def from_published(connector: Connector, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the connector's state dict out of a published checkpoint's.

    The format is recognised by its keys, whatever stands before them (`model.mm_projector.0.weight`
    and `mm_projector.0.weight` are one); keys of the rest of the model are passed over. Of several
    formats the one whose keys fit best is taken. The result is complete: load it with
    `connector.load_state_dict(result)`.

    Raises:
        UserError: no known format fits, a weight is missing or left over, or a shape differs.
    """
    tables = connector.published_keys()
    name = f"{type(connector).__name__} with {connector.config}"
    return read_published(tables, state, connector.state_dict(), name)


def read_published(
    tables: Mapping[str, Table],
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    name: str,
) -> dict[str, Tensor]:
    """Do the same for any module.

    Args:
        tables: its key tables, by format.
        state: the published checkpoint's tensors.
        expected: the module's own state dict, for the shapes.
        name: the module, for the message.

    Raises:
        UserError: as in `from_published`.
    """
    candidates = [(table, find_keys(table, state)) for table in tables.values()]
    candidates = [(table, found) for table, found in candidates if found]
    if not candidates:
        roots = sorted(
            {
                root if root in table else f"{root}."
                for table in tables.values()
                for root in roots_of(table)
            }
        )
        raise UserError(
            f"the checkpoint holds no connector that {name} knows; "
            f"it looks for keys under {', '.join(roots) or 'none'}"
        )
    table, found = min(candidates, key=lambda candidate: len(set(candidate[0]) ^ set(candidate[1])))
    if wrong := sorted(set(found) ^ set(table)):
        raise UserError(
            f"the checkpoint's connector does not fit {name}: "
            f"{', '.join(wrong)} stand only in one of the two"
        )
    own = translate(table, {theirs: state[key] for theirs, key in found.items()})
    _check_shapes(expected, own)
    return own


def to_published(connector: Connector, format_name: str) -> dict[str, Tensor]:
    """Return the connector's weights under the keys of the published format `format_name`.

    Raises:
        UserError: the connector has no such format.
    """
    tables = connector.published_keys()
    table = lookup(f"checkpoint format of {type(connector).__name__}", format_name, tables)
    return translate_back(table, connector.state_dict())


def translate(table: Table, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return {our key: tensor} of those published tensors that the table names."""
    own: dict[str, Tensor] = {}
    for key, tensor in theirs.items():
        ours = table[key]
        if isinstance(ours, str):
            own[ours] = tensor
        else:
            own.update(zip(ours.names, ours.split(tensor), strict=True))
    return own


def translate_back(table: Table, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return {published key: tensor} of all keys of the table."""
    return {
        key: own[ours] if isinstance(ours, str) else ours.join([own[name] for name in ours.names])
        for key, ours in table.items()
    }


def roots_of(table: Table) -> tuple[str, ...]:
    """Return the dotted names that are the connector's.

    Declared by the table; else what all its keys begin with, or the first name of each.
    """
    if isinstance(table, KeyTable) and table.roots:
        return table.roots
    first, last = (key.split(".") for key in (min(table), max(table)))
    count = 0
    while count < len(first) - 1 and first[count] == last[count]:
        count += 1
    if count:
        return (".".join(first[:count]),)
    return tuple(sorted({key.partition(".")[0] for key in table}))


def find_keys(table: Table, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {published key, begun at its root: key in the checkpoint}."""
    ignored = table.ignored if isinstance(table, KeyTable) else frozenset()
    found = {}
    for key in state:
        dotted = f".{key}."
        for root in roots_of(table):
            # A key that is itself a root has nothing below it: `query` is not `query.bias`.
            place = dotted.rfind(f".{root}.") if root in table else dotted.find(f".{root}.")
            published = dotted[place + 1 : -1]
            if place >= 0 and published not in ignored and (root not in table or published == root):
                found[published] = key
    return found


def _check_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights made for other widths, with both shapes."""
    for name, expected in state.items():
        if own[name].shape != expected.shape:
            raise UserError(
                f"the checkpoint's connector weight for {name!r} has shape "
                f"{tuple(own[name].shape)}, but this vision encoder and language model need "
                f"{tuple(expected.shape)}"
            )
