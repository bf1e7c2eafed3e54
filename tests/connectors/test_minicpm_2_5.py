"""Does MiniCPM-V 2.5's resampler compute what its formula says? Against torch's own attention.

There is no golden file of this version: the formula is written out here with
`nn.MultiheadAttention`, under the published keys, and the table with `numpy`.
"""

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from connectors import build_connector
from connectors.checkpoint_keys import from_published, to_published
from connectors.position_tables import sincos_2d

D, E, HEADS, QUERIES = 20, 32, 4, 6


def published(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (QUERIES, E),
        "proj": (E, E),
        "kv_proj.weight": (E, D),
        "attn.in_proj_weight": (3 * E, E),
        "attn.in_proj_bias": (3 * E,),
        "attn.out_proj.weight": (E, E),
        "attn.out_proj.bias": (E,),
        **{f"ln_{k}.{n}": (E,) for k in ("q", "kv", "post") for n in ("weight", "bias")},
    }
    return {k: torch.randn(shape, generator=generator) / 3 for k, shape in shapes.items()}


def table(height, width):
    """The published construction: a mesh of (width, height), the first half from its columns."""
    mesh = numpy.meshgrid(numpy.arange(width, dtype=float), numpy.arange(height, dtype=float))
    omega = 1.0 / 10000 ** (numpy.arange(E // 4) / (E / 4))
    angles = [numpy.einsum("hw,d->hwd", places, omega) for places in mesh]
    halves = [numpy.concatenate([numpy.sin(a), numpy.cos(a)], -1) for a in angles]
    return torch.from_numpy(numpy.concatenate(halves, -1)).float()


def formula(w, x, positions, padded=None):
    def norm(name, value):
        return F.layer_norm(value, (E,), w[f"ln_{name}.weight"], w[f"ln_{name}.bias"], 1e-6)

    attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
    attention.load_state_dict(
        {k.removeprefix("attn."): v for k, v in w.items() if k.startswith("attn.")}
    )
    x = norm("kv", x @ w["kv_proj.weight"].T)
    q = norm("q", w["query"]).expand(len(x), -1, -1)
    mixed = attention(q, x + positions, x, key_padding_mask=padded, need_weights=False)[0]
    return norm("post", mixed) @ w["proj"]


def make(weights):
    config = {"type": "minicpm_resampler", "num_queries": QUERIES, "num_heads": HEADS}
    connector = build_connector(config, [D], E)
    state = {f"resampler.{k}": v for k, v in weights.items()}
    connector.load_state_dict(from_published(connector, state))
    back = to_published(connector, "minicpm_v")
    assert set(back) == set(state) and all(torch.equal(back[k], v) for k, v in state.items())
    return connector


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 2)], ids=str)
def test_values_and_gradients(grid):
    weights, x = published(), torch.randn(2, *grid, D)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = make(weights)([ours])
    expected = formula(weights, theirs.flatten(1, 2), table(*grid).flatten(0, 1))
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    output.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert theirs.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4)


def test_padded_slices_of_several_grids():
    """The reference pads slices of unequal grids to one length and hides the padding."""
    weights, x = published(), torch.randn(2, 12, D)
    positions = torch.zeros(2, 12, E)
    positions[0], positions[1, :10] = table(3, 4).flatten(0, 1), table(2, 5).flatten(0, 1)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 10:] = False
    connector = make(weights)
    output = connector.resampler(x, positions, mask=real)
    expected = formula(weights, x, positions, padded=~real)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    alone = connector([x[1:, :10].unflatten(1, (2, 5))])
    torch.testing.assert_close(output[1:], alone, rtol=0, atol=2e-5)


def test_table_is_numpy_s():
    torch.testing.assert_close(sincos_2d(9, 5, E), table(9, 5), rtol=0, atol=1e-6)


def test_saved_table_of_a_checkpoint_is_passed_over():
    state = {f"resampler.{k}": v for k, v in published().items()}
    connector = make(published())
    found = from_published(connector, {**state, "resampler.pos_embed": torch.zeros(70, 70, E)})
    assert set(found) == set(connector.state_dict())
