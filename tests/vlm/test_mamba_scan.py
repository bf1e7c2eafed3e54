"""Are Mamba-1 language models on our scan the same models, in values, gradients and states?"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, DynamicCache, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from vlm.encoders.selective_scan import selective_scan_channels_last
from vlm.mamba_scan import ScanMixer, fade, use_scan

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "mamba_block.safetensors"
COMMON = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None}
COMMON |= {"eos_token_id": None, "pad_token_id": None}
MAMBA = {"state_size": 4, "time_step_rank": 3}
ATTENTION = {"num_attention_heads": 4, "intermediate_size": 48, "attn_layer_period": 2}
ATTENTION |= {"attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 3}
KINDS = {
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "jamba": {**ATTENTION, "num_key_value_heads": 2, "num_experts": 1, "num_experts_per_tok": 1},
    "zamba": {
        **ATTENTION,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
}


def tiny(kind: str, **changes) -> Any:
    """A bare language model with every parameter away from its start."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS.get(kind, {}), **changes})
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gradients(output, model, x) -> dict[str, Any]:
    torch.manual_seed(5)
    (output * torch.randn_like(output)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "x": x.grad}


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_loop_of_transformers(kind, padded, length) -> None:
    theirs = tiny(kind)
    ours = use_scan(copy.deepcopy(theirs))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    real = mask[..., None] if padded else 1
    results = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        x = torch.randn(2, length, 32, requires_grad=True)
        output = model(
            inputs_embeds=x, attention_mask=mask if padded else None, use_cache=False
        ).last_hidden_state
        results.append((output * real, gradients(output * real, model, x)))
    (expected, expected_gradients), (got, got_gradients) = results
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def golden_mixer() -> tuple[Any, dict[str, torch.Tensor]]:
    """The mixer of the Mamba paper's code with the weights of a golden run."""
    golden = load_file(GOLDEN)
    config = MambaConfig(hidden_size=32, state_size=16, time_step_rank=2, num_hidden_layers=1)
    holder: Any = AutoModel.from_config(config)
    mixer: Any = use_scan(holder).get_submodule("layers.0.mixer")
    parameters = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}
    mixer.load_state_dict(parameters, strict=True)
    assert isinstance(mixer, ScanMixer) and isinstance(mixer, MambaMixer)
    return mixer, golden


def test_golden_values_and_gradients() -> None:
    mixer, golden = golden_mixer()
    x = golden["in.x"].requires_grad_()
    y = mixer(x)
    torch.testing.assert_close(y, golden["out.y"], rtol=0, atol=2e-5)
    (y * golden["cot.y"]).sum().backward()
    torch.testing.assert_close(x.grad, golden["grad.x"], rtol=0, atol=1e-4)
    for name, parameter in mixer.named_parameters():
        expected = golden[f"gradparam.{name}"]
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("pieces", [[8], [1] * 8, [3, 5], [2, 1, 1, 4]])
@torch.no_grad()
def test_golden_states_after_any_pieces(pieces) -> None:
    mixer, golden = golden_mixer()
    cache = DynamicCache(config=MambaConfig(num_hidden_layers=1))
    steps = [
        mixer(x, cache_params=cache) for x in golden["in.x"][:, : sum(pieces)].split(pieces, 1)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), golden["out.step8"], rtol=0, atol=2e-5)
    expected = golden["out.step8_ssm_state"]
    torch.testing.assert_close(cache.get_recurrent_state(0), expected, rtol=0, atol=2e-5)
    expected = golden["out.step8_conv_state"]
    torch.testing.assert_close(cache.get_conv_state(0), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_earlier_state_fades_as_if_all_were_scanned(groups) -> None:
    torch.manual_seed(0)
    u, step = torch.randn(2, 9, 4).double(), torch.rand(2, 9, 4).double()
    A = -torch.rand(4, 3).double()
    B, C = torch.randn(2, 2, 9, groups, 3).double()

    def scan(part: slice):
        inputs = (u[:, part], step[:, part], A, B[:, part], C[:, part])
        return selective_scan_channels_last(*inputs, return_last_state=True)

    whole, last = scan(slice(None))
    _, state = scan(slice(0, 4))
    second, second_last = scan(slice(4, None))
    added, added_last = fade(state, step[:, 4:], A, C[:, 4:])
    torch.testing.assert_close(second + added.double(), whole[:, 4:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second_last + added_last, last)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_copies_are_those_of_transformers(kind) -> None:
    theirs = tiny(kind)
    ours = use_scan(copy.deepcopy(theirs))
    changed = [m for m in ours.modules() if isinstance(m, ScanMixer)]
    assert len(changed) == theirs.config.layer_types.count("linear_attention") + (
        theirs.config.layer_types.count("hybrid")
    )
    assert not any(isinstance(m, ScanMixer) for m in theirs.modules())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    again = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    ids = torch.arange(5)[None]
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["mamba2", "llama"])
def test_other_models_stay_as_they_are(kind) -> None:
    sizes = {"mamba2": {"num_heads": 8, "head_dim": 8}, "llama": {"num_attention_heads": 4}}
    model = tiny(kind, **sizes[kind])
    classes = [type(module) for module in model.modules()]
    assert use_scan(model) is model
    assert [type(module) for module in model.modules()] == classes


def test_bfloat16_stays_close() -> None:
    model: Any = use_scan(tiny("mamba"))
    x = torch.randn(2, 21, 32)
    exact = model(inputs_embeds=x, use_cache=False).last_hidden_state
    model.to(torch.bfloat16)
    half = model(inputs_embeds=x.to(torch.bfloat16), use_cache=False).last_hidden_state
    assert (half.float() - exact).norm() < 0.02 * exact.norm()


def test_adapters_of_all_projections_learn() -> None:
    # transformers reads dt_proj's weight past the adapter, which then never learns.
    model = use_scan(tiny("mamba"))
    targets = ["in_proj", "x_proj", "dt_proj"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted(inputs_embeds=torch.randn(1, 7, 32)).last_hidden_state.sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * 2 * len(targets)
    for name, grad in grads.items():
        assert grad is not None and grad.abs().sum() > 0, name
