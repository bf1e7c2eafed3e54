"""Are names found in the registry first, in entry points on a miss, and never guessed?"""

from importlib.metadata import EntryPoint

import pytest

from connectors import registry
from connectors.errors import UserError

REGISTRY = {"mlp": 1, "linear": 2}


def test_known_names_do_not_ask_entry_points(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("asked"))
    assert registry.lookup("connector", "mlp", REGISTRY, group="vlm.connectors") == 1


def test_entry_points_are_asked_on_a_miss(monkeypatch):
    point = EntryPoint(name="mine", value="math:pi", group="vlm.connectors")
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda **wanted: asked.append(wanted) or [point])
    found = registry.lookup("connector", "mine", REGISTRY, group="vlm.connectors")
    assert 3.14 < found < 3.15
    assert asked == [{"group": "vlm.connectors", "name": "mine"}]


@pytest.mark.parametrize("name", ["MLP", "mlp ", "ml", ""])
def test_near_misses_are_errors(name):
    with pytest.raises(UserError, match="choose from linear, mlp"):
        registry.lookup("connector", name, REGISTRY, group="vlm.connectors")
