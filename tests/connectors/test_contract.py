"""Does every connector keep the contract? A new entry of CONNECTORS needs no line here."""

import dataclasses
import json
import typing

import pytest
import torch

from connectors import (
    CONNECTORS,
    build_connector,
    connector_token_grid,
    resolve_connector_config,
)
from connectors.errors import UserError
from connectors.key_table import our_names
from connectors.qformer import QFormerConfig
from connectors.views import TextInput, Views

VISION_DIMS, TEXT_DIM = (6, 10), 16
GRIDS = [(4, 4), (4, 6), (2, 8)]
# Published sizes that are too large for these tests.
SMALL: dict[str, dict] = {
    "qformer": {"hidden_dim": 16, "num_layers": 3, "num_heads": 4, "feed_forward_dim": 24}
    | {"num_queries": 5, "vocab_size": 30, "max_num_positions": 5},
    "sva": {"hidden_dim": 16, "num_heads": 4},
}
# How much finer the last feature map has to be, where one feature to each token shows nothing.
FINER = {"minigemini": 2}


def variants(name: str) -> list[dict]:
    """The default config, and one more for each other choice of each `Literal` or bool field."""
    config_class = CONNECTORS[name].config_class
    hints = typing.get_type_hints(config_class)
    base = {"type": name, **SMALL.get(name, {})}
    configs = [base]
    for field in dataclasses.fields(config_class):
        choices = typing.get_args(hints[field.name])
        if hints[field.name] is bool:
            choices = (True, False)
        elif typing.get_origin(hints[field.name]) is not typing.Literal:
            choices = ()
        configs += [{**base, field.name: choice} for choice in choices if choice != field.default]
    return configs


# Those that only act inside the language model: tests/vlm/test_connector_matrix.py.
PROJECTING = [name for name in CONNECTORS if CONNECTORS[name].faces == {"project"}]
CONFIGS = [config for name in PROJECTING for config in variants(name)]


def ready(connector):
    """Without dropout; with a text for each view, where the connector reads one."""
    config = connector.config
    if isinstance(config, QFormerConfig) and config.instruction:

        def add_text(_, inputs):
            ids = torch.arange(5).expand(len(inputs[0][0]), -1)
            return *inputs, Views(text=TextInput(ids, ids < 4))

        connector.register_forward_pre_hook(add_text)
    return connector.eval()


def make(config, seed=0):
    torch.manual_seed(seed)
    return ready(build_connector(config, VISION_DIMS, TEXT_DIM))


def features(views, grid, config, seed=1):
    generator = torch.Generator().manual_seed(seed)
    finer = FINER.get(config["type"], 1)
    grids = [grid, (grid[0] * finer, grid[1] * finer)]
    return [
        torch.randn(views, *sides, dim, generator=generator)
        for sides, dim in zip(grids, VISION_DIMS, strict=True)
    ]


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return request.param


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("views", [0, 1, 3])
def test_shape_is_what_was_announced(config, grid, views):
    connector = make(config)
    tokens = connector(features(views, grid, config))
    rows, columns = connector.token_grid(*grid)
    assert connector.num_tokens(*grid) == rows * columns
    assert connector_token_grid(config, *grid) == (rows, columns)
    assert tokens.shape == (views, rows * columns, TEXT_DIM)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradient_reaches_every_parameter_and_every_feature(config, grid):
    connector = make(config)
    inputs = [feature.requires_grad_() for feature in features(2, grid, config)]
    connector(inputs).pow(3).sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for feature in inputs:
        assert (feature.grad.abs().sum(-1) > 0).all()


def test_views_do_not_see_each_other(config):
    connector = make(config).eval()
    both = features(2, (4, 6), config)
    alone = connector([feature[1:] for feature in both])
    torch.testing.assert_close(connector(both)[1:], alone, rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip(config):
    first, second = make(config), make(config, seed=5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(features(2, (4, 4), config)), second(features(2, (4, 4), config)))


def test_config_round_trips_through_json(config):
    resolved = resolve_connector_config(config)
    again = json.loads(json.dumps(resolved))
    assert resolve_connector_config(again) == resolved
    assert build_connector(again, VISION_DIMS, TEXT_DIM).config == make(config).config


def test_bfloat16(config):
    connector = make(config)
    exact = connector(features(2, (4, 4), config))
    rough = connector.bfloat16()([feature.bfloat16() for feature in features(2, (4, 4), config)])
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


def test_new_weights_stay_in_range(config):
    tokens = make(config)(features(2, (4, 4), config))
    assert torch.isfinite(tokens).all() and 1e-3 < tokens.std() < 10


def test_builds_on_the_meta_device(config):
    with torch.device("meta"):
        connector = build_connector(config, VISION_DIMS, TEXT_DIM)
    ready(connector).to_empty(device="cpu").load_state_dict(make(config).state_dict())
    assert torch.equal(
        connector(features(1, (4, 4), config)), make(config)(features(1, (4, 4), config))
    )


def test_key_tables_name_every_weight_once(config):
    connector = make(config)
    for table in type(connector).key_tables(connector.config).values():
        assert sorted(our_names(table)) == sorted(connector.state_dict())
        assert len(set(table)) == len(table)


def test_misspelt_field_is_refused(config):
    with pytest.raises(UserError, match=f"connector '{config['type']}' has no field 'dept_h'"):
        build_connector({**config, "dept_h": 1}, VISION_DIMS, TEXT_DIM)


def test_maps_of_unequal_grids_are_refused_in_words_or_taken(config):
    unequal = [torch.randn(1, 4, 4, VISION_DIMS[0]), torch.randn(1, 2, 2, VISION_DIMS[1])]
    try:
        tokens = make(config)(unequal)
    except UserError as error:
        assert "(4, 4), (2, 2)" in str(error)
    else:
        assert tokens.shape[::2] == (1, TEXT_DIM)
