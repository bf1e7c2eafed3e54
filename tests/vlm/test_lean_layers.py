"""Do a language model's layers learn the same when they keep less, and only where they may?"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vlm import gated_mlp
from vlm.hosts import HOSTS
from vlm.lean_layers import learn_as_usual, learn_lean

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = sorted(set(HOSTS) - {"internlm3"})  # which comes with its weights
LEAN = {"_GatedMlpBackward", "_RmsNormBackward"}


def language_model(family: str):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **SIZES)).train()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no norm of ones
    return model


def step(model) -> tuple[list[torch.Tensor], set[str]]:
    """The output and all gradients, and which of our functions made the output."""
    ids = torch.arange(1, 19).reshape(2, 9)
    out = model(ids, use_cache=False).last_hidden_state
    model.zero_grad()
    (out * torch.linspace(-1, 1, 16)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    names, seen, ahead = set(), set(), [out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(type(node).__name__)
            ahead += [before for before, _ in node.next_functions]
    return [out.detach(), *gradients], names & LEAN


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Each as a whole: where its terms cancel, a single number is all rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_family_learns_the_same(family, frozen, monkeypatch):
    monkeypatch.setattr(gated_mlp, "ROWS", 5)
    model = language_model(family)
    if frozen:  # as in a stage that trains the connector alone
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
    expected, used = step(model)
    assert not used
    lean = copy.deepcopy(model)
    learn_lean(lean)
    found, used = step(copy.deepcopy(lean))  # a copy works with its own weights
    assert used == {
        *([] if family == "phi3" else ["_GatedMlpBackward"]),  # gate and up are one matrix
        *([] if family.startswith("gemma") else ["_RmsNormBackward"]),  # multiplies by 1 + weight
    }
    assert_same(found, expected)


def test_a_layer_keeps_its_input_gate_and_up_alone():
    kept = {}
    for lean in (False, True):
        mlp = language_model("qwen2").layers[0].mlp
        if lean:
            model = language_model("qwen2")
            learn_lean(model)
            mlp = model.layers[0].mlp
        weights = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        sizes = {}

        def keep(x, sizes=sizes, weights=weights):
            place = x.untyped_storage().data_ptr()
            if place not in weights:
                sizes[place] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            mlp(torch.randn(1, 7, 16, requires_grad=True))
        kept[lean] = sum(sizes.values())
    assert kept == {False: 7 * (16 + 4 * 24), True: 7 * (16 + 2 * 24)}


def with_bias(model):
    layer = model.layers[0].mlp.up_proj
    layer.bias = torch.nn.Parameter(torch.ones(24))


def with_a_hook(model):
    model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)


def with_another_activation(model):
    model.layers[0].mlp.act_fn = torch.nn.Tanh()


def with_a_watched_activation(model):
    model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)


CHANGES = [with_bias, with_a_hook, with_another_activation, with_a_watched_activation]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_goes_its_own_way(change):
    model = language_model("llama")
    change(model)
    expected, _ = step(model)
    learn_lean(model)
    model.layers[1].mlp.forward = type(model.layers[1].mlp).forward.__get__(model.layers[1].mlp)
    found, used = step(model)
    assert used == {"_RmsNormBackward"}
    assert_same(found, expected)


def test_mixed_precision_and_no_gradients_go_their_own_way():
    model = language_model("llama")
    learn_lean(model)
    ids = torch.arange(1, 10)[None]
    plain = language_model("llama")
    with torch.no_grad():
        assert torch.equal(model(ids)[0], plain(ids)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids)[0], plain(ids)[0])
    assert torch.equal(model.bfloat16()(ids)[0], plain.bfloat16()(ids)[0])
    assert not step(model)[1]


def test_it_can_be_taken_back():
    model = language_model("llama")
    learn_lean(model)
    learn_as_usual(model)
    assert not step(model)[1]


def test_adapters_stay_in_the_layers():
    peft = pytest.importorskip("peft")
    model = language_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    expected, _ = step(model)
    learn_lean(model)
    found, used = step(model)
    assert used == {"_RmsNormBackward"}
    assert_same(found, expected)
