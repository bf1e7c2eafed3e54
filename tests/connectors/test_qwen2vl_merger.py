"""Does the merger give Qwen2-VL's numbers from a grid, and transformers' other two?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from connectors import build_connector, connector_token_grid
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUES, GRADIENTS = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-4}


def to_grid(patches):
    """Patches in blocks of 2 x 2, (24, D), as the grid (1, 4, 6, D) that they were cut from."""
    blocks = patches.reshape(2, 3, 2, 2, -1)  # block row and column, row and column in the block
    return blocks.transpose(1, 2).reshape(1, 4, 6, -1)


def load(state, dims=(12, 28), **config):
    connector = build_connector({"type": "qwen2vl_merger", **config}, [dims[0]], dims[1])
    connector.load_state_dict(from_published(connector, state))
    return connector


def test_reference_values_and_gradients():
    tensors = load_file(GOLDEN / "qwen2vl_merger.safetensors")
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    connector = load(state)
    patches = tensors["input"].clone().requires_grad_()
    tokens = connector([to_grid(patches)])
    torch.testing.assert_close(tokens[0], tensors["output"], **VALUES)
    (tokens[0] * tensors["cotangent"]).sum().backward()
    torch.testing.assert_close(patches.grad, tensors["grad.input"], **GRADIENTS)
    back = to_published(connector, "qwen2_vl")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


def qwen2_5():
    return Qwen2_5_VLPatchMerger(28, 12), "qwen2_5_vl", "rms"


def qwen3():
    config = Qwen3VLVisionConfig(hidden_size=12, out_hidden_size=28, spatial_merge_size=2)
    return Qwen3VLVisionPatchMerger(config), "qwen3_vl", "layer"


@pytest.mark.parametrize("make", [qwen2_5, qwen3])
def test_later_versions_of_transformers(make):
    torch.manual_seed(0)
    merger, format_name, norm = make()
    for parameter in merger.parameters():
        torch.nn.init.normal_(parameter)
    state = {f"visual.merger.{key}": value for key, value in merger.state_dict().items()}
    connector = load({f"model.{key}": value for key, value in state.items()}, norm=norm)
    patches = torch.randn(24, 12)
    expected = merger(patches)
    torch.testing.assert_close(connector([to_grid(patches)])[0], expected, rtol=1e-5, atol=2e-5)
    back = to_published(connector, format_name)
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


def test_grid_that_the_factor_does_not_divide():
    with pytest.raises(UserError, match=r"factor 2 does not divide .* 5 x 4"):
        connector_token_grid({"type": "qwen2vl_merger"}, 5, 4)
    with pytest.raises(UserError, match="factor must be at least 1, not 0"):
        connector_token_grid({"type": "qwen2vl_merger", "factor": 0}, 4, 4)
