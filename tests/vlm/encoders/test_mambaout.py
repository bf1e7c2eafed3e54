"""Does timm's MambaOut, as the adapter uses it, give the numbers of the published code?

The published model is channels last inside; its one final norm stands behind the pool. The adapter
gives stage outputs as they are for `layer: -1` to `-4`, and the norm at every position for "last".
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.mambaout import checkpoint_filter_fn
from torch.nn.functional import layer_norm

from vlm.encoders import build_vision_encoder

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
ARGUMENTS = {
    "mambaout": {"depths": [1, 1, 2, 1], "dims": [16, 24, 40, 48]},
    "mambaout_partial_conv": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "conv_ratio": 0.5},
}
STAGES = [-4, -3, -2, -1]


@pytest.fixture(params=ARGUMENTS)
def name(request):
    return request.param


@pytest.fixture
def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def build(name, golden, layer) -> Any:
    """Return the adapter with the published weights, under timm's names for them."""
    config = {"type": "timm", "source": "mambaout_femto", "image_size": 64, "layer": layer}
    encoder: Any = build_vision_encoder({**config, "model_args": ARGUMENTS[name]})
    published = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}
    state = checkpoint_filter_fn(published, encoder.model)
    wanted = encoder.model.state_dict()
    encoder.model.load_state_dict({key: state[key] for key in wanted})
    return encoder.eval()


def test_stages_and_the_pictures_gradient(name, golden):
    encoder = build(name, golden, STAGES)
    image = golden["in.image"].requires_grad_()
    stages = encoder.extract(image)  # not `forward`, which wants squares: these are 64 x 96
    for i, stage in enumerate(stages):
        torch.testing.assert_close(stage, golden[f"out.stage{i}"], rtol=0, atol=2e-5)
    total = torch.stack([(s * golden[f"cot.stage{i}"]).sum() for i, s in enumerate(stages)]).sum()
    total.backward()
    torch.testing.assert_close(image.grad, golden["grad.image"], rtol=0, atol=1e-4)


def test_last_is_the_published_norm_at_every_position(name, golden):
    encoder = build(name, golden, "last")
    (features,) = encoder.extract(golden["in.image"])
    stage = golden["out.stage3"]
    parameters = golden["param.norm.weight"], golden["param.norm.bias"]
    wanted = layer_norm(stage, stage.shape[-1:], *parameters, eps=1e-6)
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-5)
    # That this is the norm of the published model: it is the one between its pool and its head.
    pooled = layer_norm(stage.mean((1, 2)), stage.shape[-1:], *parameters, eps=1e-6)
    torch.testing.assert_close(pooled, golden["out.pooled"], rtol=0, atol=2e-5)


def test_only_some_channels_are_convolved(golden, name):
    block = build(name, golden, -1).model.stages[0].blocks[0]
    width = ARGUMENTS[name]["dims"][0]
    ratio = ARGUMENTS[name].get("conv_ratio", 1.0)
    assert block.conv.in_channels == block.conv.groups == int(ratio * width)
    assert block.fc1.out_features == 2 * int(8 / 3 * width)
