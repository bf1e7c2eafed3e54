"""Is the language model's every linear layer quantised, and nothing else?"""

import pytest
import torch

from vlm.adapters import AdapterConfig, add_adapter, merge_adapter
from vlm.errors import UserError
from vlm.quantization import dequantize, quantize, quantized_linears, true_size

pytest.importorskip("bitsandbytes")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of nf4
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_quantised(make_model, kind) -> None:
    model, _ = make_model(kind="qwen2", tied=True, **WIDE)  # with biases
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = sum(parameter.numel() for parameter in model.parameters())
    quantize(model, kind, torch.float32)
    found = quantized_linears(model)
    assert len(found) == 2 * 7
    assert {name.rpartition(".")[2] for name in found} == set(NAMES)
    assert all(name.startswith("model.language_model.layers.") for name in found)
    after = model.state_dict()
    for name in before:
        if name.removesuffix(".weight") not in found:
            assert torch.equal(after[name], before[name]), name
    assert sum(true_size(parameter) for parameter in model.parameters()) == sizes
    assert not any(model.get_parameter(f"{name}.weight").requires_grad for name in found)

    dequantize(model, torch.float32)
    assert quantized_linears(model) == []
    bound = {"nf4": 0.12, "int8": 0.01}[kind]
    for name, tensor in model.state_dict().items():
        assert (tensor - before[name]).norm() <= bound * before[name].norm(), name
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize(("kind", "dora"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_it_learns_beside_them(make_model, kind, dora) -> None:
    model, _ = make_model(**WIDE)
    quantize(model, kind, torch.float32)
    add_adapter(model, AdapterConfig(rank=2, alpha=4, dropout=0.0, dora=dora))
    ids = torch.arange(12)[None]
    model.eval()
    with torch.no_grad():
        first = model(input_ids=ids, labels=ids).loss  # bitsandbytes may pack for inference here
    model.train()
    learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(learn.values(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for name, p in learn.items() if "lora_B" in name)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(first.item(), rel=2e-3)
    assert losses[2] < losses[0] - 0.01


def test_a_scan_reads_its_weights_past_the_layer(make_model, monkeypatch) -> None:
    model, _ = make_model()
    monkeypatch.setattr(model.model, "state_traits", object())
    with pytest.raises(UserError, match="reads the weights of its layers directly"):
        quantize(model, "nf4", torch.float32)


def test_rows_that_are_not_whole_blocks(make_model) -> None:
    model, _ = make_model()
    with pytest.raises(UserError, match=r"multiple of 64, but layers.0.self_attn.q_proj has 32"):
        quantize(model, "nf4", torch.float32)
    quantize(model, "int8", torch.float32)


def test_a_language_model_without_linear_layers(make_model) -> None:
    model, _ = make_model(kind="gpt2")
    with pytest.raises(UserError, match="has no linear layers"):
        quantize(model, "int8", torch.float32)


def test_merged_into_what_the_quantised_weights_stand_for(make_model) -> None:
    model, _ = make_model(**WIDE)
    quantize(model, "nf4", torch.float32)
    dequantize(model, torch.float32)
    add_adapter(model, AdapterConfig(rank=2, alpha=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(12)[None]
    model.eval()
    expected = model(input_ids=ids).logits
    merge_adapter(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
