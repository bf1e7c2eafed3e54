"""Is every mistake in a config named: the field, the value, and what is allowed?"""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from connectors import build_connector, connector_token_grid
from connectors.config import config_from_mapping
from connectors.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sample:
    needed: int
    rate: float = 0.5
    name: str | None = None
    mode: Literal["a", "b", 1] = "a"
    flag: bool = False
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "x")
    names: list[str] = field(default_factory=list)
    layer: int | tuple[int, ...] | Literal["last"] = "last"
    extra: dict = field(default_factory=dict)
    table: dict[str, int] = field(default_factory=dict)
    anything: Any = None


def parse(**values):
    return config_from_mapping(Sample, values, "sample")


def test_good_values_arrive():
    config = parse(
        needed=3,
        rate=1,
        name="n",
        mode=1,
        flag=True,
        sizes=[1, 2],
        pair=[2, "y"],
        names=["u"],
        layer=[-1, -2],
        extra={"k": [1]},
        table={"k": 1},
        anything={1},
    )
    assert config.rate == 1.0 and isinstance(config.rate, float)
    assert (config.sizes, config.pair, config.layer) == ((1, 2), (2, "y"), (-1, -2))
    assert (config.mode, config.names, config.extra) == (1, ["u"], {"k": [1]})


BAD = [
    ({"needed": "3"}, "field 'needed' must be int, not '3'"),
    ({"needed": True}, "field 'needed' must be int, not True"),
    ({"needed": 3.0}, "field 'needed' must be int, not 3.0"),
    ({}, r"needs the field 'needed' \(int\), which is missing"),
    ({"needed": 1, "rate": "5e-4"}, "field 'rate' must be float, not '5e-4'"),
    ({"needed": 1, "rate": True}, "field 'rate' must be float, not True"),
    ({"needed": 1, "name": 4}, "field 'name' must be str or None, not 4"),
    ({"needed": 1, "mode": "c"}, "field 'mode' must be one of 'a', 'b', 1, not 'c'"),
    ({"needed": 1, "mode": True}, "field 'mode' must be one of"),
    ({"needed": 1, "flag": 1}, "field 'flag' must be bool, not 1"),
    ({"needed": 1, "sizes": [1, "2"]}, r"field 'sizes'\[1\] must be int, not '2'"),
    ({"needed": 1, "sizes": 3}, "field 'sizes' must be a list of int, not 3"),
    ({"needed": 1, "pair": [1]}, "field 'pair' must be a list of 2: int, str, not "),
    ({"needed": 1, "layer": "first"}, "field 'layer' must be int or .* or one of 'last'"),
    ({"needed": 1, "extra": []}, "field 'extra' must be a mapping"),
    ({"needed": 1, "raet": 1.0}, r"has no field 'raet' \(did you mean 'rate'\?\); its fields are"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        parse(**values)


BAD_CONNECTORS = [
    ({"type": "mpl"}, r"unknown connector 'mpl' \(did you mean 'mlp'\?\); choose from .*linear, "),
    ({"depth": 2}, "connector must be a mapping with a 'type'"),
    ("mlp", "connector must be a mapping with a 'type'"),
    ({"type": "mlp", "depth": "two"}, "connector 'mlp': field 'depth' must be int, not 'two'"),
    ({"type": "mlp", "depth": 0}, "depth must be at least 1, not 0"),
    ({"type": "pixel_shuffle", "factor": 0}, "factor must be at least 1, not 0"),
    ({"type": "pixel_shuffle", "version": "v3"}, "must be one of 'v1', 'v2', not 'v3'"),
    (
        {"type": "linear", "depth": 2},
        "connector 'linear' has no field 'depth'; its fields are none",
    ),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONNECTORS, ids=str)
def test_bad_connectors_are_named(config, message):
    with pytest.raises(UserError, match=message):
        build_connector(config, [4], 8)


@pytest.mark.parametrize("grid", [(5, 6), (6, 5), (27, 27)], ids=str)
def test_grid_that_the_factor_does_not_divide(grid):
    with pytest.raises(UserError, match=f"factor 2 does not divide .* {grid[0]} x {grid[1]}"):
        connector_token_grid({"type": "pixel_shuffle"}, *grid)


def test_other_factors():
    assert connector_token_grid({"type": "pixel_shuffle", "factor": 3}, 27, 27) == (9, 9)
    v1 = {"type": "pixel_shuffle", "version": "v1"}
    assert connector_token_grid(v1, 4, 6) == (3, 2)
    connector = build_connector({"type": "pixel_shuffle", "factor": 4}, [2], 8)
    assert connector.layers[0].normalized_shape == (32,)
