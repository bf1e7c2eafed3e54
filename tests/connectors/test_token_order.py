"""Do connectors that keep the picture's layout put each token where its features were?"""

import pytest
import torch

from connectors import build_connector
from connectors.chain import ChainConfig, Part, Plugged
from connectors.gated_cross_attention import GatedCrossAttentionConnector
from connectors.mlp import MLPConnector
from connectors.perceiver import PerceiverConfig, PerceiverConnector

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


EACH_FEATURE_MOVES_ONE_TOKEN = [
    *SPATIAL,
    {"type": "pooling"},
    {"type": "pooling", "pool": "after", "side": 2},
    {"type": "cogvlm_glu"},
    {"type": "cogvlm_glu", "merge": True},
    [{"type": "mlp", "features": [0]}],
]


@pytest.mark.parametrize("config", EACH_FEATURE_MOVES_ONE_TOKEN, ids=str)
def test_cells_tell_which_part_of_the_view_a_token_was_made_from(config):
    torch.manual_seed(0)
    connector = build_connector(config, [5], 8)
    height, width = 4, 6
    told = connector.view_token_cells([(height, width)])
    base = torch.randn(1, height, width, 5)

    def project(maps):
        made = connector(maps)
        return made.tokens if isinstance(made, Plugged) else made

    assert len(told.cells) == project([base]).shape[1]
    for row in range(height):
        for column in range(width):
            lit = base.clone()
            lit[0, row, column] += 1.0
            changed = (project([lit]) - project([base])).abs().amax(-1)[0] > 1e-6
            cells = [told.cells[token] for token in changed.nonzero().flatten().tolist()]
            here = (row * told.rows // height) * told.columns + column * told.columns // width
            assert cells == [here], (row, column)


def test_queries_and_tokens_out_of_the_sequence_have_no_place():
    perceiver = Part("perceiver", PerceiverConnector, PerceiverConfig(), None)
    taking = GatedCrossAttentionConnector
    gated = Part("gated_cross_attention", taking, taking.config_class(), None)
    mlp = Part("mlp", MLPConnector, MLPConnector.config_class(), (0,))
    assert perceiver.config.token_cells(4, 6) is None
    assert ChainConfig(parts=(mlp,)).view_token_cells([(4, 6)]) is not None
    assert ChainConfig(parts=(mlp, gated)).view_token_cells([(4, 6)]) is None
    assert ChainConfig(parts=(perceiver, gated)).view_token_cells([(4, 6)]) is None
