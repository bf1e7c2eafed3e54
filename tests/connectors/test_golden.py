"""Do connectors give the references' values and gradients, from the references' weights?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from connectors import build_connector
from connectors.checkpoint_keys import from_published, to_published
from connectors.pixel_shuffle import pixel_shuffle

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load(config, state, vision_dim):
    """Build from published keys, and check that they come back out the same."""
    connector = build_connector(config, [vision_dim], 40)
    connector.load_state_dict(from_published(connector, state))
    return connector


def check(connector, grid, cotangent, output, gradient):
    """Compare values and the gradient of sum(output * cotangent) at the feature grid."""
    grid = grid.clone().requires_grad_()
    tokens = connector([grid])
    torch.testing.assert_close(tokens, output, rtol=0, atol=VALUE_TOLERANCE)
    (tokens * cotangent).sum().backward()
    torch.testing.assert_close(grid.grad, gradient, rtol=0, atol=GRADIENT_TOLERANCE)


LLAVA = [
    ("linear", {"type": "linear"}),
    ("mlp2x_gelu", {"type": "mlp", "depth": 2}),
    ("mlp3x_gelu", {"type": "mlp", "depth": 3}),
]


@pytest.mark.parametrize(("variant", "config"), LLAVA, ids=[name for name, _ in LLAVA])
def test_llava(variant, config):
    tensors = golden("llava_mlp")
    state = under(tensors, f"{variant}.param.")
    connector = load(config, state, 24)
    check(
        connector,
        tensors["input"].unflatten(1, (3, 3)),
        tensors[f"{variant}.cotangent"],
        tensors[f"{variant}.output"],
        tensors[f"{variant}.grad.input"].unflatten(1, (3, 3)),
    )
    back = to_published(connector, "llava")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_internvl(version):
    tensors = golden("internvl_pixel_shuffle")
    state = under(tensors, "param.")
    connector = load({"type": "pixel_shuffle", "version": version}, state, 12)

    def to_grid(states):
        return states[:, 1:].unflatten(1, (6, 6))  # without the class token

    gradient = tensors[f"{version}.grad.vit_last_hidden_state"]
    assert gradient[:, 0].abs().max() == 0
    check(
        connector,
        to_grid(tensors["vit_last_hidden_state"]),
        tensors[f"{version}.cotangent"],
        tensors[f"{version}.output"],
        to_grid(gradient),
    )
    back = to_published(connector, "internvl")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_internvl_order_of_channels_and_tokens(version):
    tensors = golden("internvl_pixel_shuffle")
    numbered = torch.arange(6 * 6 * 4).reshape(1, 6, 6, 4)
    shuffled = pixel_shuffle(numbered, 2, version)
    assert torch.equal(shuffled.flatten(0, 2), tensors[f"{version}.index_map"])
    rectangle = torch.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    shuffled = pixel_shuffle(rectangle, 2, version)
    assert torch.equal(shuffled, tensors[f"{version}.index_map_rect_4x6"])


def test_internvl_port_of_transformers_has_the_same_weights():
    state = under(golden("internvl_pixel_shuffle"), "param.")
    connector = load({"type": "pixel_shuffle"}, state, 12)
    ported = to_published(connector, "hf_internvl")
    again = from_published(connector, {f"model.{key}": value for key, value in ported.items()})
    assert all(torch.equal(again[key], value) for key, value in connector.state_dict().items())


def test_idefics3():
    tensors = golden("idefics3_pixel_shuffle")
    state = {f"model.connector.{k}": v for k, v in under(tensors, "param.").items()}
    config = {"type": "pixel_shuffle", "factor": 2, "projection": "linear"}
    connector = load(config, state, 12)
    grid = tensors["input"].unflatten(1, (6, 6))
    torch.testing.assert_close(pixel_shuffle(grid, 2).flatten(1, 2), tensors["shuffled"])
    check(
        connector,
        grid,
        tensors["cotangent"],
        tensors["output"],
        tensors["grad.input"].unflatten(1, (6, 6)),
    )
    back = to_published(connector, "idefics3")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)
