"""Are pooled tokens the means of their cells, whichever comes first, pooling or MLP?"""

import pytest
import torch
from torch import nn

from connectors import build_connector, connector_token_grid
from connectors.checkpoint_keys import to_published
from connectors.errors import UserError
from connectors.pooling import pool


def make(**config):
    torch.manual_seed(0)
    return build_connector({"type": "pooling", **config}, [5], 8)


def means(features, rows, columns):
    """The mean over each cell, computed cell by cell."""
    _, height, width, _ = features.shape
    cells = []
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * height // rows, -(-(i + 1) * height // rows)
            left, right = j * width // columns, -(-(j + 1) * width // columns)
            cells.append(features[:, top:bottom, left:right].mean((1, 2)))
    return torch.stack(cells, dim=1)


@pytest.mark.parametrize("side", [None, 2, 3])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (3, 3)], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_average(grid, side, when):
    connector = make(side=side, pool=when)
    features = torch.randn(2, *grid, 5)
    rows, columns = connector.token_grid(*grid)
    assert (rows, columns) == ((side, side) if side else (-(-grid[0] // 2), -(-grid[1] // 2)))
    if when == "before":
        expected = connector.layers(means(features, rows, columns))
    else:
        expected = means(connector.layers(features), rows, columns)
    torch.testing.assert_close(connector([features]), expected)


def test_bilinear_reads_between_four_features():
    features = torch.randn(1, 6, 6, 2)
    middle = features[:, 1::3, 1::3]  # thirds: the middle of a cell of three is a feature
    torch.testing.assert_close(pool(features, (2, 2), "bilinear"), middle)
    pairs = features.unflatten(1, (3, 2)).unflatten(3, (3, 2)).mean((2, 4))
    torch.testing.assert_close(pool(features, (3, 3), "bilinear"), pairs)


def test_before_and_after_are_one_for_a_linear_layer():
    before, after = make(depth=1), make(depth=1, pool="after")
    features = [torch.randn(1, 4, 4, 5)]
    torch.testing.assert_close(before(features), after(features))
    assert not torch.allclose(make()(features), make(pool="after")(features))


def test_weights_are_llavas():
    connector = make(depth=3)
    assert isinstance(connector.layers[1], nn.GELU)
    assert set(to_published(connector, "llava")) == {
        f"mm_projector.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")
    }


def test_numbers_are_checked():
    with pytest.raises(UserError, match="side and depth must be at least 1, not 0 and 2"):
        connector_token_grid({"type": "pooling", "side": 0}, 4, 4)
