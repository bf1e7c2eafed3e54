"""Do encoders meet on one grid as in Eagle, and go through Prismatic's MLP?"""

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from connectors import build_connector, connector_token_grid
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError


def make(**config):
    torch.manual_seed(0)
    return build_connector({"type": "channel_concat", **config}, [4, 6], 8)


def maps():
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 4, 4), (7, 5, 6))
    return [torch.randn(2, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("side", [None, 4, 6])
def test_eagle_resizes_what_is_not_on_the_grid(side, align_corners):
    connector = make(side=side, align_corners=align_corners)
    grid = (side or 4, side or 4)
    resized = []
    for m in maps():
        picture = m.permute(0, 3, 1, 2)
        if picture.shape[-2:] != grid:
            picture = interpolate(picture, grid, mode="bilinear", align_corners=align_corners)
        resized.append(picture.flatten(2).transpose(1, 2))
    first, gelu, last = connector.layers
    assert isinstance(gelu, nn.GELU) and gelu.approximate == "none"
    expected = last(gelu(first(torch.cat(resized, dim=-1))))
    torch.testing.assert_close(connector(maps()), expected)
    assert connector_token_grid({"type": "channel_concat", "side": side}, 4, 4) == grid


def test_prismatics_mlp():
    connector = make(projection="fused_mlp")
    shapes = [tuple(m.weight.shape) for m in connector.layers if isinstance(m, nn.Linear)]
    assert shapes == [(40, 10), (8, 40), (8, 8)]
    one_grid = [torch.randn(2, 3, 3, 4), torch.randn(2, 3, 3, 6)]
    x = torch.cat(one_grid, dim=-1).flatten(1, 2)
    weights = to_published(connector, "hf_prismatic")

    def linear(name, x):
        return x @ weights[f"projector.{name}.weight"].T + weights[f"projector.{name}.bias"]

    gelu = nn.functional.gelu
    expected = linear("fc3", gelu(linear("fc2", gelu(linear("fc1", x)))))
    torch.testing.assert_close(connector(one_grid), expected)


@pytest.mark.parametrize("format_name", ["prismatic", "hf_prismatic"])
def test_prismatics_two_formats_are_told_apart(format_name):
    connector = make(projection="fused_mlp")
    state = to_published(connector, format_name)
    found = from_published(connector, {f"model.{key}": value for key, value in state.items()})
    assert all(torch.equal(found[key], value) for key, value in connector.state_dict().items())


def test_eagles_keys():
    assert set(to_published(make(), "eagle")) == {
        f"mm_projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }


def test_side_is_positive():
    with pytest.raises(UserError, match="side must be positive, not 0"):
        make(side=0)
