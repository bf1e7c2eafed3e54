"""Is the gated block OpenFlamingo's?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from connectors.gated_cross_attention import GatedBlock, openflamingo_keys

GOLDEN = Path(__file__).parents[1] / "fixtures/golden/openflamingo_gated_xattn.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def test_golden(golden) -> None:
    block = GatedBlock(24, 32, num_heads=4, head_dim=8, hidden_factor=4)
    keys = {k.split(".", 2)[2]: v.split(".", 2)[2] for k, v in openflamingo_keys([0]).items()}
    theirs = {
        name.removeprefix("immediate.param."): tensor
        for name, tensor in golden.items()
        if name.startswith("immediate.param.")
    }
    block.load_state_dict({keys[name]: tensor for name, tensor in theirs.items()})
    x = golden["immediate.x"].requires_grad_()
    media = golden["immediate.media"].requires_grad_()
    time = golden["immediate.media_locations"].cumsum(-1)  # (B, L)
    owner = torch.arange(1, 4).repeat_interleave(6)
    output = block(x, media.flatten(1, 2), time[..., None] == owner)
    torch.testing.assert_close(output, golden["immediate.output"], rtol=0, atol=2e-5)
    output.backward(golden["immediate.cotangent"])
    torch.testing.assert_close(x.grad, golden["immediate.grad.x"], rtol=0, atol=1e-4)
    torch.testing.assert_close(media.grad, golden["immediate.grad.media"], rtol=0, atol=1e-4)


def test_new_blocks_change_nothing() -> None:
    block = GatedBlock(24, 32, num_heads=4, head_dim=8, hidden_factor=4)
    x = torch.randn(2, 5, 24)
    mask = torch.ones(2, 5, 7, dtype=torch.bool)
    assert torch.equal(block(x, torch.randn(2, 7, 32), mask), x)
