"""Do the query-based resamplers give the references' values and gradients, from their weights?"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from connectors import build_connector
from connectors.checkpoint_keys import from_published, to_published, translate, translate_back
from connectors.perceiver import PerceiverResampler, resampler_keys
from connectors.position_tables import resize_table, sincos_2d

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load(config, state, vision_dim, text_dim=32):
    """Build from published keys, and check that they come back out the same, both ways."""
    connector = build_connector(config, [vision_dim], text_dim)
    connector.load_state_dict(from_published(connector, state))
    (name,) = type(connector).key_tables(connector.config)
    back = to_published(connector, name)
    assert set(back) <= set(state) and all(torch.equal(back[key], state[key]) for key in back)
    again = from_published(connector, {f"model.{key}": value for key, value in back.items()})
    assert all(torch.equal(again[key], value) for key, value in connector.state_dict().items())
    return connector


def compare(run, given, tensors, prefix="", gradient="input"):
    """Compare values, and the gradient of sum(output * cotangent) at what was given."""
    given = given.clone().requires_grad_()
    output = run(given)
    torch.testing.assert_close(output, tensors[f"{prefix}output"], rtol=0, atol=2e-5)
    (output * tensors[f"{prefix}cotangent"]).sum().backward()
    expected = tensors[f"{prefix}grad.{gradient}"]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(given.grad, expected, rtol=0, atol=1e-4)


def test_openflamingo_perceiver():
    tensors = golden("openflamingo_perceiver")
    state = {f"perceiver.{k}": v for k, v in under(tensors, "param.").items()}
    config = {"type": "perceiver", "projection": "none", "num_queries": 6, "num_layers": 2}
    connector = load({**config, "num_heads": 4, "head_dim": 8}, state, 32)
    compare(connector.resampler, tensors["input"], tensors)
    # As a connector, each medium is a view: its 10 features are a grid of 2 x 5.
    views = tensors["input"].flatten(0, 2).unflatten(1, (2, 5))
    tokens = connector([views])
    torch.testing.assert_close(tokens, tensors["output"].flatten(0, 1), rtol=0, atol=2e-5)


def test_openflamingo_perceiver_of_frames_and_media():
    tensors = golden("openflamingo_perceiver")
    state = {f"perceiver.{k}": v for k, v in under(tensors, "video_param.").items()}
    table = resampler_keys(1, frames=True, media=True)
    module = PerceiverResampler(32, 6, 1, 4, 8, max_num_frames=4, max_num_media=3)
    own = {k.removeprefix("resampler."): v for k, v in translate(table, state).items()}
    module.load_state_dict(own)
    back = translate_back(table, {f"resampler.{k}": v for k, v in module.state_dict().items()})
    assert set(back) == set(state)
    output = module(tensors["video_input"])
    torch.testing.assert_close(output, tensors["video_output"], rtol=0, atol=2e-5)


def test_idefics2():
    tensors = golden("idefics2_perceiver")
    state = {f"model.{k}": v for k, v in under(tensors, "param.").items()}
    config = {"type": "idefics2_perceiver", "num_queries": 6, "num_layers": 2, "num_heads": 4}
    config |= {"num_key_heads": 2, "head_dim": 12, "projection_dim": 44}
    connector = build_connector(config, [20], 32)
    connector.load_state_dict(from_published(connector, state))
    back = to_published(connector, "idefics2")
    assert {f"model.{key}" for key in back} == set(state)
    compare(
        lambda x: connector.resampler(x, tensors["attention_mask"]),
        tensors["image_hidden_states"],
        tensors,
        gradient="image_hidden_states",
    )


@pytest.mark.parametrize("case", ["same_grid", "bicubic_grid"])
def test_minicpm_2_0(case):
    tensors = golden("minicpm_resampler")
    state = {f"resampler.{k}": v for k, v in under(tensors, "param.").items()}
    config = {"type": "minicpm_resampler", "version": "2.0", "num_queries": 16, "num_heads": 4}
    connector = load(config, state, 20)
    side = round(tensors[f"{case}.input"].shape[1] ** 0.5)
    torch.testing.assert_close(
        connector.positions(side, side), tensors[f"{case}.key_pos_embed"], rtol=0, atol=2e-6
    )
    compare(
        lambda x: connector([x.unflatten(1, (side, side))]),
        tensors[f"{case}.input"],
        tensors,
        f"{case}.",
    )


def test_qwen_vl():
    tensors = golden("qwen_vl_adapter")
    state = under(tensors, "param.")
    # The rest of the encoder lies under the same name and is not the connector's.
    others = {"transformer.visual.conv1.weight": torch.zeros(1)}
    config = {"type": "qwen_vl", "num_queries": 16, "num_heads": 4}
    connector = load(config, {**state, **others}, 20)
    table = connector.positions(8, 8)
    torch.testing.assert_close(table, tensors["key_pos_embed"], rtol=0, atol=2e-6)
    compare(lambda x: connector([x.unflatten(1, (8, 8))]), tensors["input"], tensors)


@pytest.mark.parametrize("name", ["minicpm_resampler", "qwen_vl_adapter"])
def test_stored_tables_are_what_we_compute(name):
    (stored,) = (v for k, v in golden(name).items() if k.endswith(".pos_embed"))
    torch.testing.assert_close(sincos_2d(4, 4, 32).flatten(0, 1), stored, rtol=0, atol=1e-6)


def test_tables_of_uneven_grids_keep_rows_and_columns_apart():
    table = sincos_2d(3, 5, 8)
    assert torch.equal(table[:, 2, :4], table[:1, 2, :4].expand(3, -1))  # one column, one code
    assert torch.equal(table[1, :, 4:], table[1, :1, 4:].expand(5, -1))
    assert torch.equal(table, sincos_2d(7, 9, 8)[:3, :5])
    resized = resize_table(sincos_2d(4, 4, 8).flatten(0, 1), 2, 6).unflatten(0, (2, 6))
    torch.testing.assert_close(resized[0, :, :4], resized[1, :, :4], rtol=0, atol=1e-5)
    assert (resized[0, :, 4:] - resized[1, :, 4:]).abs().max() > 0.1
