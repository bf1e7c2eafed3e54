"""Do connectors that keep the picture's layout put each token where its features were?"""

import pytest
import torch

from connectors import build_connector

SPATIAL = [
    {"type": "linear"},
    {"type": "mlp"},
    {"type": "pixel_shuffle"},
    {"type": "pixel_shuffle", "projection": "linear"},
    {"type": "pixel_shuffle", "version": "v1"},
]


@pytest.mark.parametrize("config", SPATIAL, ids=str)
def test_each_feature_moves_the_token_of_its_place_alone(config):
    torch.manual_seed(0)
    connector = build_connector(config, [5], 8)
    height, width = 4, 6
    base = torch.randn(1, height, width, 5)
    rows, columns = connector.token_grid(height, width)
    transposed = config.get("version") == "v1"
    for row in range(height):
        for column in range(width):
            lit = base.clone()
            lit[0, row, column] += 1.0
            changed = (connector([lit]) - connector([base])).abs().amax(-1)[0] > 1e-6
            at = (column, row) if transposed else (row, column)
            sides = (width, height) if transposed else (height, width)
            place = (at[0] * rows // sides[0]) * columns + at[1] * columns // sides[1]
            assert changed.nonzero().flatten().tolist() == [place], (row, column)


def test_several_maps_are_joined_in_their_order():
    torch.manual_seed(0)
    connector = build_connector({"type": "linear"}, [2, 3], 8)
    first, second = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 3)
    expected = connector.layer(torch.cat([first, second], dim=-1)).flatten(1, 2)
    assert torch.equal(connector([first, second]), expected)
