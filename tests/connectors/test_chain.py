"""Which lists of connectors can work, and what does each part of one get?"""

import pytest
import torch

from connectors import build_connector, connector_token_grid, resolve_connector_config
from connectors.chain import ConnectorChain
from connectors.errors import UserError
from connectors.fusion import HostLinear, HostShape

MLP = {"type": "mlp"}
LORA = {"type": "partial_lora", "rank": 2}
GATED = {"type": "gated_cross_attention", "every": 1, "num_heads": 2, "head_dim": 4}
PERCEIVER = {
    "type": "perceiver",
    "num_queries": 3,
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 4,
    "projection": "none",
}
HOST = HostShape(
    "llama", 16, 2, 2, 8, 1e-6, ((HostLinear("self_attn.q_proj", ("q",), 16, 16, False),),) * 2
)


def build(config, dims=(6, 6)):
    torch.manual_seed(0)
    chain = build_connector(config, dims, 16, HOST)
    assert isinstance(chain, ConnectorChain)
    return chain


REFUSED = [
    ([], "exactly one that projects"),
    ([GATED], r"exactly one that projects.*put \{type: mlp\} before"),
    ([GATED, PERCEIVER], r"takes the tokens of one before it: .*\[\{type: perceiver\}, "),
    ([LORA, GATED, MLP], r"'gated_cross_attention' takes the tokens of one before it"),
    ([MLP, GATED, GATED], "each take the tokens of a view; leave one"),
    ([MLP, {"type": "deepstack"}, GATED], "'deepstack' gives something to each image token"),
    ([MLP, {**LORA, "linears": []}], "linears names no linear layer"),
    ([MLP, {"type": "visual_expert", "linears": []}], "linears names no linear layer"),
    ([MLP, {**LORA, "linears": ["q", "q"]}], "linears names 'q' twice"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=str)
def test_lists_that_cannot_work_are_refused_before_anything_is_built(config, words) -> None:
    with pytest.raises(UserError, match=words):
        resolve_connector_config(config)


SHUFFLE = {"type": "pixel_shuffle", "factor": 2}
DEEPSTACK = {"type": "deepstack", "factor": 2}


@pytest.mark.parametrize(
    "config",
    [[SHUFFLE, {"type": "deepstack"}], [{"type": "deepstack"}, SHUFFLE], [MLP, DEEPSTACK]],
    ids=str,
)
def test_parts_that_give_other_numbers_of_tokens_are_refused_in_any_order(config) -> None:
    with pytest.raises(UserError, match=r"'deepstack' makes \d x \d tokens of a view, but \d x \d"):
        connector_token_grid(config, 4, 4)


def test_every_map_of_a_part_has_to_fit_the_tokens() -> None:
    chain = build([{**SHUFFLE, "features": [0]}, DEEPSTACK])
    assert chain.view_token_grid([(4, 4), (4, 4)]) == (2, 2)
    with pytest.raises(UserError, match=r"makes 4 x 4 tokens of a view, but 2 x 2 of 'pixel_shuf"):
        chain.view_token_grid([(4, 4), (8, 8)])


@pytest.mark.parametrize("config", [[PERCEIVER, GATED], [PERCEIVER, LORA, GATED]], ids=str)
def test_what_takes_tokens_says_how_wide_they_are_wherever_it_stands(config) -> None:
    chain = build(config)
    tokens, sides = chain([torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6)])
    (media,) = sides[len(config) - 1]
    assert media.shape == (2, 3, 12) and tokens.shape == (2, 1, 16)
    assert chain.view_token_grid([(4, 4), (4, 4)]) == (1, 1)


def test_one_connector_may_choose_its_maps_too() -> None:
    config = {"type": "mlp", "features": [1]}
    assert resolve_connector_config(config) == {"type": "mlp", "depth": 2, "features": [1]}
    assert resolve_connector_config([config]) == [resolve_connector_config(config)]
    chain = build(config, dims=(6, 10))
    one, other = torch.randn(1, 2, 2, 6), torch.randn(1, 4, 4, 10)
    assert chain.view_token_grid([(2, 2), (4, 4)]) == (4, 4)
    assert torch.equal(chain([one, other]).tokens, chain([one + 1, other]).tokens)
