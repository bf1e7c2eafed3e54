"""Does patch-info mining give Mini-Gemini's numbers, tile by tile and for the whole image?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from connectors import build_connector
from connectors.checkpoint_keys import from_published, to_published
from connectors.errors import UserError

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUES, GRADIENTS = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def tensors():
    return load_file(GOLDEN / "minigemini_mining.safetensors")


@pytest.fixture
def state(tensors):
    return {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}


@pytest.fixture
def connector(state):
    return load(state, {"type": "minigemini"}, [24, 16])


def load(state, config, dims):
    built = build_connector(config, dims, 40)
    built.load_state_dict(from_published(built, state))
    return built


def maps(tensors):
    low = tensors["images_feat"].unflatten(1, (3, 3))
    high = tensors["images_aux_feat"].permute(0, 2, 3, 1)
    return [low.clone().requires_grad_(), high.clone().requires_grad_()]


def test_reference_values_and_gradients(connector, tensors):
    low, high = maps(tensors)
    mined = connector.mine(low, high).flatten(1, 2)
    torch.testing.assert_close(mined, tensors["mined"], **VALUES)
    tokens = connector([low, high])
    torch.testing.assert_close(tokens, tensors["output"], **VALUES)
    (tokens * tensors["cotangent"]).sum().backward()
    torch.testing.assert_close(low.grad.flatten(1, 2), tensors["grad.images_feat"], **GRADIENTS)
    gradient = high.grad.permute(0, 3, 1, 2)
    torch.testing.assert_close(gradient, tensors["grad.images_aux_feat"], **GRADIENTS)


def test_the_hd_form_cuts_one_map(state, tensors):
    connector = load(state, {"type": "minigemini", "tiles": 2}, [24, 24, 16])
    views = tensors["hd_images_feat"].unflatten(2, (3, 3))  # four tiles, then the whole image
    rows = [torch.cat([views[:, i], views[:, i + 1]], dim=2) for i in (0, 2)]
    high = tensors["hd_images_aux_feat"].permute(0, 2, 3, 1)
    tokens = connector([views[:, -1], torch.cat(rows, dim=1), high])
    torch.testing.assert_close(tokens, tensors["hd_output"], **VALUES)
    assert connector.num_tokens(3, 3) == tokens.shape[1]


def test_the_checkpoint_comes_back_the_same(connector, state):
    back = to_published(connector, "minigemini")
    assert {f"model.{key}" for key in back} == set(state)
    assert all(torch.equal(value, state[f"model.{key}"]) for key, value in back.items())


def test_a_token_sees_the_window_under_it():
    torch.manual_seed(0)
    connector = build_connector({"type": "minigemini"}, [3, 5], 4)
    low, high = torch.randn(1, 2, 3, 3), torch.randn(1, 4, 6, 5)
    base = connector([low, high])
    for row in range(4):
        for column in range(6):
            lit = high.clone()
            lit[0, row, column, 0] += 1.0  # not all channels: they are normed
            changed = (connector([low, lit]) - base).abs().amax(-1)[0] > 1e-6
            assert changed.nonzero().flatten().tolist() == [row // 2 * 3 + column // 2]


def test_two_maps_are_needed_and_the_second_is_a_multiple():
    with pytest.raises(UserError, match=r"needs two feature maps.* gives 1"):
        build_connector({"type": "minigemini"}, [3], 4)
    with pytest.raises(UserError, match=r"tiles 2 needs three .* gives 2; .* tiles: \[2, 1\]"):
        build_connector({"type": "minigemini", "tiles": 2}, [3, 5], 4)
    with pytest.raises(UserError, match="tiles must be at least 1"):
        build_connector({"type": "minigemini", "tiles": 0}, [3, 5], 4)
    connector = build_connector({"type": "minigemini", "tiles": 2}, [3, 3, 5], 4)
    with pytest.raises(UserError, match="tiles 2 of a whole view of 2 x 2 features do not make"):
        connector([torch.randn(1, 2, 2, 3), torch.randn(1, 2, 2, 3), torch.randn(1, 4, 4, 5)])
    connector = build_connector({"type": "minigemini"}, [3, 5], 4)
    with pytest.raises(UserError, match=r"no multiple of the first, \(2, 2\), \(4, 6\)"):
        connector([torch.randn(1, 2, 2, 3), torch.randn(1, 4, 6, 5)])


def test_published_size():
    with torch.device("meta"):
        connector = build_connector({"type": "minigemini"}, [1024, 2880], 4096)
    mining = sum(p.numel() for n, p in connector.named_parameters() if "projector" not in n)
    assert mining == (2 * 1024 + 1024**2 + 1024) + 2 * (2 * 2880 + 2880 * 1024 + 1024)
