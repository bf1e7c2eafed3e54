"""Is the selective scan the reference's, in every backend, layout, direction and length?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.encoders.selective_scan import selective_scan, selective_scan_channels_last
from vlm.errors import UserError

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
BACKENDS = ["reference", "chunked"]
LENGTHS = [1, 2, 7, 197, 513]


def random_scan(length, groups=1, states=4, channels=6, batch=2, dtype=torch.float64, seed=0):
    """Return channels-last tensors of a stable system with every option in use."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -normal(channels, states).exp(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) - 1,
    }


def with_gradients(function, tensors, weights=None, **options):
    """Return y, the last state and the gradients of a weighted sum of both."""
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    y, state = function(**tensors, return_last_state=True, **options)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)
        ]
    torch.autograd.backward([y, state], [w.to(x) for w, x in zip(weights, (y, state), strict=True)])
    grads = {f"grad of {name}": x.grad for name, x in tensors.items()}
    return {"y": y.detach(), "state": state.detach(), **grads}


def assert_near(got, expected, values=2e-5, gradients=1e-4, rtol=1e-6):
    """Compare values and gradients; numbers in the hundreds may be off by float32's rounding."""
    for name, want in expected.items():
        atol = gradients if name.startswith("grad") else values
        torch.testing.assert_close(
            got[name], want, rtol=rtol, atol=atol, check_dtype=False, msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["var", "group4_n1", "const", "plain", "nosoftplus", "stress_large_delta"]
)
def test_golden(name, backend):
    file = GOLDEN / f"selective_scan_{name}.safetensors"
    softplus = json.loads(file.with_suffix(".json").read_text())["config"]["delta_softplus"]
    tensors = load_file(file)
    inputs = {key[3:]: x for key, x in tensors.items() if key.startswith("in.")}
    weights = [tensors["cot.y"], torch.zeros_like(tensors["out.last_state"])]
    got = with_gradients(selective_scan, inputs, weights, delta_softplus=softplus, backend=backend)
    expected = {"y": tensors["out.y"], "state": tensors["out.last_state"]}
    expected |= {f"grad of {name}": tensors[f"grad.{name}"] for name in inputs}
    assert_near(got, expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True, (False, True), (True, False, False)])
def test_chunked_is_the_reference_in_float64(length, reverse):
    tensors = random_scan(length, groups=3 if reverse == (True, False, False) else 1)
    options = {"delta_softplus": True, "reverse": reverse}
    expected = with_gradients(selective_scan_channels_last, tensors, backend="reference", **options)
    got = with_gradients(selective_scan_channels_last, tensors, backend="chunked", **options)
    assert_near(got, expected, 1e-11, 1e-11, 1e-11)


def test_reversed_scan_is_the_scan_of_the_flipped_sequence():
    tensors = random_scan(7)
    over_time = ("u", "delta", "B", "C", "z")
    flipped = {k: v.flip(1) if k in over_time else v for k, v in tensors.items()}
    expected = selective_scan_channels_last(**flipped, backend="reference").flip(1)
    got = selective_scan_channels_last(**tensors, backend="reference", reverse=True)
    assert torch.equal(got, expected)


def test_wrong_shapes_are_named():
    tensors = random_scan(7)
    with pytest.raises(UserError, match=r"delta must be \(2, 7, 6\), not \(2, 6, 6\)"):
        selective_scan_channels_last(**{**tensors, "delta": tensors["delta"][:, 1:]})
