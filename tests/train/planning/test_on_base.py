"""Does a model with an adapter or quantised weights cost in a plan what it does with values?"""

import pytest
import torch

from train.freeze import freeze
from train.planning import rehearsal
from train.planning.on_base import packed_bytes, put_on_base, state_bytes
from train.planning.rehearsal import Rehearsal
from train.planning.step import Sample, make_batch, rehearse
from vlm.adapters import AdapterConfig, add_adapter, is_adapter
from vlm.quantization import linears_to_quantize, quantize

SAMPLE = Sample(((48, 40),), 20, 9)
TRAINED = {"connector": 1e-3, "language_model": 1e-3}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def _keep_values(monkeypatch):
    monkeypatch.setattr(rehearsal, "MOST_VALUES", 2**40)


def prepare(model, trained=TRAINED):
    freeze(model, trained)
    model.activation_checkpointing_disable()
    return model.train()


@pytest.mark.parametrize("dora", [False, True])
def test_bytes_of_an_adapter_are_those_of_a_step_with_values(both, dora):
    pytest.importorskip("peft")
    real, hollow = both()
    adapter = AdapterConfig(rank=4, alpha=8, dropout=0.1, dora=dora)
    add_adapter(real, adapter)
    put_on_base(hollow, adapter, None, torch.float32, False)
    sizes = [{n: p.numel() for n, p in m.named_parameters()} for m in (real, hollow)]
    assert sizes[0] == sizes[1] and any(map(is_adapter, sizes[0]))
    prepare(real)
    watch = Rehearsal([*real.parameters(), *real.buffers()])
    with watch:
        batch = make_batch(real, SAMPLE, 3)
        batch["pixel_values"] = torch.rand(batch["pixel_values"].shape)
        real(**batch, num_items_in_batch=1).loss.backward()
    cost = rehearse(prepare(hollow), SAMPLE, 3)
    assert cost.with_gradients == pytest.approx(watch.peak, rel=0.01)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_bytes_are_those_of_bitsandbytes(both, kind):
    pytest.importorskip("bitsandbytes")
    real, hollow = both(**WIDE)
    quantize(real, kind, torch.float32)
    put_on_base(hollow, None, kind, torch.float32, False)
    for name in linears_to_quantize(both(**WIDE)[1], kind):
        weight = real.get_submodule(f"model.language_model.{name}").weight
        kept = [weight.data]
        if kind == "int8":
            kept.append(weight.SCB)
        else:
            state = weight.quant_state
            outer = state.state2
            kept += [state.absmax, state.code, state.offset, outer.absmax, outer.code]
        own = hollow.get_submodule(f"model.language_model.{name}")
        size = sum(t.numel() * t.element_size() for t in kept)
        assert own.packed.numel() == size == packed_bytes(kind, *own.weight.shape)


def test_an_adapter_spares_the_gradients_of_weights(both):
    pytest.importorskip("peft")
    adapter = AdapterConfig(rank=1, alpha=1, dropout=0.0)
    costs = {}
    for kind in ("whole", None, "nf4", "int8"):
        _, model = both(**WIDE)
        if kind != "whole":
            put_on_base(model, adapter, kind, torch.float32, False)
        model.train()
        freeze(model, TRAINED)
        model.activation_checkpointing_enable()
        costs[kind] = rehearse(model, SAMPLE, 3)
    whole, lora, nf4, int8 = costs.values()
    # the gradients of inputs alone: a good half of the backward pass
    assert 0.5 < lora.backward["language_model"] / whole.backward["language_model"] < 0.7
    assert nf4.flops == int8.flops == lora.flops
    assert nf4.recomputed == int8.recomputed == lora.recomputed > 0


def test_in_8_bits_inputs_stay_in_spite_of_checkpoints(both):
    activations = {}
    for kind in ("nf4", "int8"):
        _, model = both(**WIDE)
        put_on_base(model, None, kind, torch.float32, False)
        freeze(model, {"connector": 1e-3})
        model.activation_checkpointing_enable()
        activations[kind] = rehearse(model, SAMPLE, 30).activations
    assert activations["int8"] > 1.3 * activations["nf4"]


def test_frozen_bytes_of_packed_and_other_weights(both):
    _, model = both(**WIDE)
    names = linears_to_quantize(model, "nf4")
    shapes = [model.model.language_model.get_submodule(name).weight.shape for name in names]
    whole = sum(p.numel() for p in model.parameters())
    put_on_base(model, None, "nf4", torch.float32, False)
    freeze(model, {"connector": 1e-3})
    trained, frozen, size = state_bytes(model, 2)
    packed = sum(packed_bytes("nf4", *shape) for shape in shapes)
    others = whole - trained - sum(shape.numel() for shape in shapes)
    assert frozen == packed + others
    assert frozen * size == pytest.approx(packed + 2 * others)
