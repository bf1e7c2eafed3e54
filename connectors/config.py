"""How does a dict from a recipe or `config.json` become a frozen dataclass, all fields checked?

`huggingface_hub.dataclasses.strict` checks types in `__setattr__`, which the generated `__init__`
of a *frozen* dataclass does not call: on those it checks nothing. This module checks the annotation
of every field itself and says in one sentence which field is wrong and what it may be.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from connectors.errors import UserError

C = TypeVar("C")


def config_from_mapping(config_class: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build `config_class` from `values`; every key must be a field and every value of its type.

    Lists become tuples where the field is a tuple, ints become floats where it is a float; nothing
    else is converted.

    Args:
        config_class: a dataclass whose fields are annotated with plain types, `Literal`,
            `X | None`, `tuple[X, ...]`, `list[X]` or `dict`.
        values: field name -> value.
        where: what the values configure, for the message, such as "connector 'mlp'".

    Raises:
        UserError: unknown field, missing field, or a value of the wrong type.
    """
    assert dataclasses.is_dataclass(config_class), config_class
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    hints = typing.get_type_hints(config_class)
    for name in values:
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            allowed = ", ".join(fields) or "none"
            raise UserError(f"{where} has no field {name!r}{hint}; its fields are {allowed}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise UserError(
                f"{where} needs the field {name!r} ({describe_type(hints[name])}), which is missing"
            )
    checked = {
        name: check_value(value, hints[name], f"{where}: field {name!r}")
        for name, value in values.items()
    }
    return config_class(**checked)


def check_value(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the annotation `hint` wants it.

    Raises:
        UserError: the value is not of that type, or no finite number.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _check_union(value, arguments, hint, where)
    if origin is Literal:
        # `True == 1`: the type has to agree too.
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        fixed = origin is tuple and Ellipsis not in arguments
        if not fixed or len(value) == len(arguments):
            hints = arguments if fixed else (arguments[0],) * len(value)
            pairs = enumerate(zip(value, hints, strict=True))
            return origin(check_value(item, kind, f"{where}[{i}]") for i, (item, kind) in pairs)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, origin or hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be {describe_type(hint)}, not {value!r}")


def _check_union(value: Any, choices: tuple[Any, ...], hint: Any, where: str) -> Any:
    """Return `value` as the first of `choices` that takes it."""
    for choice in choices:
        try:
            return check_value(value, choice, where)
        except UserError:
            continue
    raise UserError(f"{where} must be {describe_type(hint)}, not {value!r}")


def describe_type(hint: Any) -> str:
    """Return the annotation in words: "one of 'v1', 'v2'", "int or None", "a list of int"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if hint is type(None):
        return "None"
    if origin is dict or hint is dict:
        return "a mapping"
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}: {', '.join(map(describe_type, arguments))}"
    if origin in (tuple, list):
        item = describe_type(arguments[0])
        return f"a list, each of it {item}" if " " in item else f"a list of {item}"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint)


def check_positive(where: str, **values: int) -> None:
    """Refuse numbers below 1.

    Args:
        where: what they configure, for the message, such as "connector 'mlp'".
        values: field name -> number.

    Raises:
        UserError: one of them is below 1.
    """
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{where}: {name} must be at least 1, not {value}")
