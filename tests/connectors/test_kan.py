"""Are the curves pykan's, and do they keep their shape on another grid?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu
from torch.utils import _device
from transformers.initialization import meta_device_safe_creation_ops

from connectors import build_connector, kan
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError
from connectors.spline import (
    add_outer_knots,
    interpolate_grid,
    refit,
    sample_grid,
    spline_basis,
    uniform_grid,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUES, GRADIENTS = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def tensors():
    return load_file(GOLDEN / "kan_linear.safetensors")


@pytest.fixture
def state(tensors):
    parameters = {k.removeprefix("param."): v for k, v in tensors.items() if "param." in k}
    return {f"act_fun.0.{key}": value for key, value in parameters.items()}


@pytest.fixture
def connector(state):
    built = make([6], 5, norm="none")
    built.load_state_dict(from_published(built, state))
    return built


def make(dims, text_dim, **config):
    torch.manual_seed(0)
    return build_connector({"type": "kan", **config}, dims, text_dim)


def curves(x, knots, coefficients):
    """Every input's curve to every output at points (M, I): (M, I, O)."""
    return torch.einsum("mic,ioc->mio", spline_basis(x, knots, 3), coefficients)


def test_basis(tensors):
    basis = spline_basis(tensors["input"], tensors["param.grid"], 3)
    torch.testing.assert_close(basis, tensors["bspline_basis"], **VALUES)
    splines = curves(tensors["input"], tensors["param.grid"], tensors["param.coef"])
    torch.testing.assert_close(splines.transpose(1, 2), tensors["postspline"], **VALUES)


def test_reference_values_and_gradients(connector, tensors):
    features = tensors["input"].reshape(1, 11, 1, 6).clone().requires_grad_()
    tokens = connector([features])
    torch.testing.assert_close(tokens[0], tensors["output"], **VALUES)
    (tokens[0] * tensors["cotangent"]).sum().backward()
    torch.testing.assert_close(features.grad[0, :, 0], tensors["grad.input"], **GRADIENTS)
    layer = connector.layer
    for name, parameter in (
        ("coef", layer.coef),
        ("scale_base", layer.scale_base),
        ("scale_sp", layer.scale_spline),
    ):
        torch.testing.assert_close(parameter.grad, tensors[f"gradp.{name}"], **GRADIENTS)


def test_the_checkpoint_comes_back_the_same(connector, state):
    back = to_published(connector, "pykan")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


def test_extension_as_the_reference(tensors):
    old, coefficients, x = (tensors[n] for n in ("param.grid", "param.coef", "extend.samples"))
    grid = add_outer_knots(interpolate_grid(old[:, 3:-3], 10), 3)
    torch.testing.assert_close(grid, tensors["extend.grid"], **VALUES)
    theirs = curves(x, tensors["extend.grid"], tensors["extend.coef"])
    ours = curves(x, grid, refit(coefficients, x, old, grid, 3))
    torch.testing.assert_close(ours, theirs, **VALUES)
    torch.testing.assert_close(ours, curves(x, old, coefficients), **VALUES)


def test_grid_from_samples_as_the_reference(tensors):
    old, coefficients, x = (tensors[n] for n in ("param.grid", "param.coef", "update.samples"))
    grid = add_outer_knots(sample_grid(x, 5, 0.02), 3)
    torch.testing.assert_close(grid, tensors["update.grid"], **VALUES)
    theirs = curves(x, tensors["update.grid"], tensors["update.coef"])
    ours = curves(x, grid, refit(coefficients, x, old, grid, 3))
    torch.testing.assert_close(ours, theirs, **VALUES)


@pytest.mark.parametrize("given", [True, False])
def test_an_extended_connector_makes_the_same_tokens(connector, given):
    inside = [torch.rand(2, 8, 8, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1]
    connector.layer.mask[2, 3] = 0
    before = connector(inside)
    extended = connector.extended(10, inside if given else None)
    assert extended.config.intervals == 10 and extended.layer.coef.shape == (6, 5, 13)
    torch.testing.assert_close(extended(inside), before, **VALUES)
    assert torch.equal(connector(inside), before)  # untouched
    again = build_connector({"type": "kan", "norm": "none", "intervals": 10}, [6], 5)
    again.load_state_dict(extended.state_dict())
    assert torch.equal(again(inside), extended(inside))
    extended(inside).sum().backward()
    assert extended.layer.coef.grad.abs().sum() > 0


def test_a_grid_of_any_size_is_refined_to_any_other():
    grid = torch.tensor([[0.0, 1.0, 3.0, 4.0]])
    expected = torch.tensor([[0.0, 0.75, 2.0, 3.25, 4.0]])  # at 0, 0.75, 1.5, 2.25 and 3 steps
    torch.testing.assert_close(interpolate_grid(grid, 4), expected)


def test_the_grid_moves_to_the_features():
    connector = make([3], 4)
    shifted = [torch.randn(4, 8, 8, 3)]
    connector.norm.bias.data.fill_(5.0)
    normed = connector.norm(shifted[0]).flatten(0, 2)
    assert not connector.layer.knots(normed).any()  # far beyond the grid
    connector.fit_grid(shifted)
    inner = connector.layer.knots.inner()
    torch.testing.assert_close(inner[:, 0], normed.amin(0))
    torch.testing.assert_close(inner[:, -1], normed.amax(0))
    basis = connector.layer.knots(normed)
    torch.testing.assert_close(basis.sum(-1), torch.ones_like(normed))


def test_knots_that_coincide():
    grid = torch.tensor([[-1.0, 0.0, 0.0, 0.0, 1.0]])
    x = torch.linspace(-0.99, 0.99, 20)[:, None].requires_grad_()
    basis = spline_basis(x, add_outer_knots(grid, 3), 3)
    torch.testing.assert_close(basis.sum(-1), torch.ones(20, 1))
    basis[:, 0, 2].sum().backward()
    assert torch.isfinite(x.grad).all()


def test_chunks_change_nothing(monkeypatch):
    connector = make([4], 6)
    features = torch.randn(2, 3, 5, 4)
    results = []
    for rows in (1000, 7):
        monkeypatch.setattr(kan, "CHUNK_ROWS", rows)
        connector.zero_grad()
        x = features.clone().requires_grad_()
        tokens = connector([x])
        tokens.pow(2).sum().backward()
        results.append((tokens.detach(), x.grad, connector.layer.coef.grad.clone()))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole)


def test_outside_of_the_grid_silu_remains():
    connector = make([4], 6, norm="none")
    far = torch.full((1, 1, 1, 4), 10.0)
    expected = silu(far) @ connector.layer.scale_base
    torch.testing.assert_close(connector([far]), expected.flatten(1, 2))


def test_a_masked_curve_is_gone():
    connector = make([4], 6, norm="none")
    connector.layer.mask[2, 3] = 0
    one = torch.rand(1, 1, 1, 4)
    two = one.clone()
    two[..., 2] -= 0.5
    moved = (connector([one]) - connector([two])).flatten().nonzero().flatten()
    assert moved.tolist() == [0, 1, 2, 4, 5]


def test_new_weights_are_pykans():
    connector = make([64], 32, noise=0.3)
    layer = connector.layer
    assert layer.scale_base.abs().max() <= 1 / 8 and layer.scale_base.std() > 0.06
    assert (layer.scale_spline == 1 / 8).all()
    heights = curves(layer.knots.inner().T, layer.knots.grid, layer.coef)  # at the grid's points
    assert 0.0295 < heights.abs().max() <= 0.0301  # 0.3 / 5 / 2
    parameters = sum(p.numel() for p in layer.parameters())
    assert parameters == 64 * 32 * (5 + 3 + 2)


def test_half_precision_leaves_the_knots():
    connector = make([4], 6, intervals=50).bfloat16()
    assert connector.layer.knots.grid.dtype == torch.float32
    assert connector([torch.randn(1, 2, 2, 4).bfloat16()]).dtype == torch.bfloat16


BAD = [
    ({"intervals": 0}, "intervals and order must be at least 1"),
    ({"low": 1.0, "high": -1.0}, "low below high, not 5, 3, 1.0 and -1.0"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=str)
def test_wrong_numbers_are_named(config, message):
    with pytest.raises(UserError, match=message):
        make([4], 6, **config)


def test_extensions_that_cannot_be_are_named():
    connector = make([4], 6)
    with pytest.raises(UserError, match="5 intervals are no extension of the 5"):
        connector.extended(5)
    with pytest.raises(UserError, match="4 features cannot fix curves of 13 coefficients"):
        connector.extended(10, [torch.randn(1, 2, 2, 4)])


def test_stands_on_the_meta_device_whatever_transformers_loaded_before():
    remembered = _device._device_constructors
    remembered.cache_clear()
    try:
        with torch.device("meta"), meta_device_safe_creation_ops():
            torch.empty(1)  # as from_pretrained, first in a process
        with torch.device("meta"):
            assert uniform_grid(0.0, 1.0, 3).is_meta
    finally:
        remembered.cache_clear()
    assert uniform_grid(0.0, 1.0, 3).device.type == "cpu"
