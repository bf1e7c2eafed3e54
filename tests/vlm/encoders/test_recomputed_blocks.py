"""Are a trained encoder's blocks computed again in the backward pass, and a frozen one's not?"""

import re
from collections import Counter
from typing import Any

import pytest
import torch

from vlm.encoders import VISION_ENCODERS, build_vision_encoder
from vlm.errors import UserError
from vlm.loading import assemble

# Tiny encoder -> a part of every block that is called once in the block's forward pass.
PARTS = {
    "vim": r"layers\.\d+\.mixer",
    "vim_mamba2": r"layers\.\d+\.mixer",
    "vmamba": r"blocks\.\d+\.op",
    "vmamba_v0": r"blocks\.\d+\.op",
    "vil": r"rowwise_\w+\.layer",
    "vil_v1": r"blocks\.\d+\.layer",
    "clip": r"layers\.\d+\.self_attn",
    "siglip": r"layers\.\d+\.self_attn",
    "dinov2": r"layer\.\d+\.attention",
    "dinov2_registers": r"layer\.\d+\.attention",
    "internvl": r"layer\.\d+\.attention",
    "timm_vit": r"blocks\.\d+\.attn",
    "timm_eva_registers": r"blocks\.\d+\.attn",
    "timm_swin": r"blocks\.\d+\.attn",
    "timm_convnext": r"blocks\.\d+\.conv_dw",
    "timm_mambaout": r"blocks\.\d+\.conv",
    "open_clip_vit": r"resblocks\.\d+\.attn",
    "open_clip_timm": r"blocks\.\d+\.conv_dw",
}


@pytest.fixture
def make(build, make_language_model, make_tokenizer):
    def make(encoder):
        model, processor = assemble(
            encoder,
            {"type": "linear"},
            make_language_model(),
            tokenizer=make_tokenizer(),
            chat_template="chatml",
        )
        return model.train(), processor

    return make


def count_calls(model, pattern):
    """Return a counter that the calls of the tower's parts of that name go up."""
    calls = Counter()
    for name, module in model.model.vision_tower.named_modules():
        if re.search(f"(^|\\.){pattern}$", name):
            calls[name] = 0
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def run(model, batch):
    """Return the loss and all gradients of one step."""
    model.zero_grad()
    torch.manual_seed(3)  # drop path draws
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_every_type_is_tested(tiny):
    # "several" consists of the others; "patches" has no blocks.
    types = {tiny[name]["type"] for name in PARTS}
    assert types == set(VISION_ENCODERS) - {"several", "patches"}


@pytest.mark.parametrize("name", PARTS)
def test_trained(name, build, make, rows):
    drops = {"drop_path": 0.3} if name in ("vim", "vmamba", "vil", "vil_v1") else {}
    model, processor = make(build(name, **drops))
    batch = processor.collate(rows(processor), "right")
    calls = count_calls(model, PARTS[name])
    assert len(calls) > 1
    wanted_loss, wanted = run(model, batch)
    assert set(calls.values()) == {1}

    model.activation_checkpointing_enable()
    calls.update(dict.fromkeys(calls, -1))
    loss, gradients = run(model, batch)
    assert set(calls.values()) == {2}
    assert torch.equal(loss, wanted_loss)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, wanted[key]), key

    model.activation_checkpointing_disable()
    calls.update(dict.fromkeys(calls, -2))
    run(model, batch)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("name", PARTS)
def test_frozen(name, build, make, rows):
    model, processor = make(build(name))
    model.model.vision_tower.requires_grad_(False)
    model.train().activation_checkpointing_enable()
    calls = count_calls(model, PARTS[name])
    run(model, processor.collate(rows(processor), "right"))
    assert set(calls.values()) == {1}


def test_a_frozen_encoder_beside_a_trained_one(tiny, make, rows):
    parts = {"type": "several", "encoders": [tiny["vmamba"], tiny["timm_convnext"]]}
    model, processor = make(build_vision_encoder({**parts, "resize_to": [8, 8]}))
    model.model.vision_tower.encoders[1].requires_grad_(False)
    model.train().activation_checkpointing_enable()
    trained = count_calls(model, PARTS["vmamba"])
    frozen = count_calls(model, PARTS["timm_convnext"])
    run(model, processor.collate(rows(processor), "right"))
    assert set(trained.values()) == {2} and set(frozen.values()) == {1}


@pytest.mark.parametrize("name", PARTS)
def test_inputs_without_gradients(name, build, make, rows):
    # PyTorch's older, "reentrant" way would leave the parts without gradients.
    model, processor = make(build(name))
    for key, parameter in model.model.vision_tower.named_parameters():
        parameter.requires_grad_(re.search(rf"(^|\.){PARTS[name]}\.", key) is not None)
    batch = processor.collate(rows(processor), "right")
    _, wanted = run(model.train(), batch)
    model.activation_checkpointing_enable()
    _, gradients = run(model, batch)
    assert sum("vision_tower" in key for key in gradients) > 1
    for key, gradient in gradients.items():
        assert torch.equal(gradient, wanted[key]), key


def test_a_model_that_cannot():
    config = {"type": "timm", "source": "convit_tiny", "layer": -1, "image_size": 32}
    sizes = {"embed_dim": 8, "depth": 1, "local_up_to_layer": 0, "num_heads": 2}
    encoder: Any = build_vision_encoder({**config, "model_args": sizes}).train()
    images = torch.zeros(1, 3, 32, 32)
    encoder(images)
    encoder.gradient_checkpointing = True
    with pytest.raises(UserError, match=r"ConVit cannot be recomputed .*; freeze the encoder, or"):
        encoder(images)
    encoder.eval()(images)
