"""Do the parts inside the language model give the references' numbers, from their weights?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from connectors.beside_linears import key_of
from connectors.checkpoint_keys import read_published, translate_back
from connectors.fusion import FusionContext
from connectors.gated_cross_attention_blocks import (
    GatedCrossAttentionBlock,
    gated_cross_attention_keys,
    gated_layers,
)
from connectors.high_resolution_blocks import (
    HighResolutionBlock,
    LearnedPositions,
    high_resolution_keys,
)
from connectors.key_table import GroupedHeads
from connectors.token_routed_linear import LowRank, TokenRoutedLinear, partial_lora_keys
from connectors.visual_expert_blocks import visual_expert_keys

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
VALUES, GRADIENTS = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-4}
OTHERS = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(3), "lm_head.weight": torch.ones(2)}


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def under(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load(module, tables, name, published):
    """Load published weights that lie among others; check that they come back the same."""
    table = tables[name]
    found = read_published(tables, {**published, **OTHERS}, module.state_dict(), name)
    module.load_state_dict(found)
    back = translate_back(table, module.state_dict())
    assert set(back) == set(published)
    assert all(torch.equal(back[key], published[key]) for key in back)


def check_gradient(given, tensors, name):
    expected = tensors[name]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(given.grad, expected, **GRADIENTS)


# Of the block before decoder layer 3.
PLACES = {
    "open_flamingo": "gated_cross_attn_layers.3.",
    "open_flamingo_mpt": "transformer.blocks.3.gated_cross_attn_layer.",
    "open_flamingo_llama": "model.layers.3.gated_cross_attn_layer.",
    "open_flamingo_neox": "gpt_neox.layers.3.gated_cross_attn_layer.",
}


@pytest.mark.parametrize("variant", ["immediate", "all_previous"])
def test_flamingo(variant):
    tensors = under(golden("openflamingo_gated_xattn"), f"{variant}.")
    block = GatedCrossAttentionBlock(24, 32, 4, 8)
    blocks = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    block.attention.unseen = "zero" if variant == "immediate" else "uniform"
    for name, place in PLACES.items():
        published = {f"lang_encoder.{place}{k}": v for k, v in under(tensors, "param.").items()}
        load(blocks, gated_cross_attention_keys([3], "blocks."), name, published)
    x, media = tensors["x"].requires_grad_(), tensors["media"].requires_grad_()
    text_time = tensors["media_locations"].cumsum(-1)[..., None]  # (B, L, 1)
    media_time = torch.arange(1, 4).repeat_interleave(6)  # (M,)

    def sees(time):
        return time == media_time if variant == "immediate" else time >= media_time

    output = block(x, media.flatten(1, 2), sees(text_time))
    torch.testing.assert_close(output, tensors["output"], **VALUES)
    (output * tensors["cotangent"]).sum().backward()
    check_gradient(x, tensors, "grad.x")
    check_gradient(media, tensors, "grad.media")
    # A later token, from keys and values that were kept.
    step = block(
        tensors["cached_x"],
        media.flatten(1, 2)[:, :0],
        sees(text_time[:, -1:]),
        block.attention.read_media(media.flatten(1, 2)),
    )
    torch.testing.assert_close(step, tensors["cached_output"], **VALUES)


def test_flamingo_mends_what_text_before_the_first_image_gets():
    tensors = under(golden("openflamingo_gated_xattn"), "all_previous.")
    blocks = nn.ModuleList([GatedCrossAttentionBlock(24, 32, 4, 8)])
    tables = gated_cross_attention_keys([0], "")
    root = "lang_encoder.gated_cross_attn_layers.0."
    published = {f"{root}{k}": v for k, v in under(tensors, "param.").items()}
    load(blocks, tables, "open_flamingo", published)
    (block,) = blocks
    x, media = tensors["x"], tensors["media"].flatten(1, 2)
    time = tensors["media_locations"].cumsum(-1)
    mask = time[..., None] >= torch.arange(1, 4).repeat_interleave(6)
    output, before = block(x, media, mask), time == 0
    assert before.any() and not before.all()
    torch.testing.assert_close(output[~before], tensors["output"][~before], **VALUES)
    assert (output - tensors["output"])[before].abs().amax(-1).min() > 1e-3
    alone = block(x, media[:, :0], None)  # no media at all
    torch.testing.assert_close(output[before], alone[before], **VALUES)


def test_flamingo_published_places_and_sizes():
    assert gated_layers(24, 1) == list(range(24))
    assert gated_layers(32, 4) == [3, 7, 11, 15, 19, 23, 27, 31]
    with torch.device("meta"):
        block = GatedCrossAttentionBlock(4096, 1024)
    size = sum(parameter.numel() for parameter in block.parameters())
    dim = 4096
    assert size == 2 * dim + 512 * dim + 1024 * 1024 + 512 * dim + 1 + 2 * dim + 8 * dim**2 + 1


def test_cogagent():
    tensors = golden("cogagent_cross_attn")
    block = HighResolutionBlock(32, 16, 16, 4)
    both = nn.ModuleDict({"blocks": nn.ModuleList([block]), "positions": LearnedPositions(4, 16)})
    published = {f"model.layers.2.{k}": v for k, v in under(tensors, "param.").items()}
    published["model.cross_vision.pos_embed"] = torch.randn(16, 16)
    load(both, high_resolution_keys([2], "blocks.", "positions."), "cogagent", published)
    x = tensors["hidden_states"].requires_grad_()
    media = tensors["encoder_outputs"].requires_grad_()
    mask = tensors["attention_mask_additive"][:, 0] == 0
    assert not mask.all()
    output = block(x, media, mask)
    torch.testing.assert_close(output, tensors["output"], **VALUES)
    (output * tensors["cotangent"]).sum().backward()
    check_gradient(x, tensors, "grad.hidden_states")
    check_gradient(media, tensors, "grad.encoder_outputs")


GROUPED = GroupedHeads("q", "k", "v", num_key_heads=2, head_dim=5)  # of the golden's 40 rows


class SplitLinear(nn.Module):
    """The golden's joined layer as a host has it: queries, keys and values apart, routed."""

    def __init__(self, weight, scale):
        super().__init__()
        self.bases = nn.ModuleDict()
        for name, rows in zip("qkv", GROUPED.split(weight), strict=True):
            self.bases[name] = nn.Linear(*rows.shape[::-1], bias=False)
            self.bases[name].load_state_dict({"weight": rows})
        self.added = nn.ModuleDict(
            {name: LowRank(24, b.out_features, 6, 6 * scale) for name, b in self.bases.items()}
        )

    def forward(self, x, rows):
        made = [TokenRoutedLinear(self.bases[n], self.added[n])(x, rows) for n in "qkv"]
        return GROUPED.join([part.movedim(-1, 0) for part in made]).movedim(0, -1)


@pytest.mark.parametrize(("prefix", "scale"), [("", 1.0), ("scaled_", 2.0)])
def test_partial_lora(prefix, scale):
    tensors = golden("plora")
    state = under(tensors, f"{prefix}param.")
    layer = SplitLinear(state["weight"], scale)
    place = "model.layers.0.attention.wqkv."
    published = {place + k: v for k, v in state.items() if "Plora" in k}
    names = {role: f"{role}." for role in "qkv"}
    load(layer.added, partial_lora_keys([names], 2, 5), "xcomposer2", published)
    x = tensors["input"].clone().requires_grad_()
    output = layer(x, tensors["im_mask"].flatten().nonzero()[:, 0])
    bias = state.get("bias", torch.zeros(()))
    torch.testing.assert_close(output + bias, tensors[f"{prefix}output"], **VALUES)
    if prefix:
        return
    (output * tensors["cotangent"]).sum().backward()
    check_gradient(x, tensors, "grad.input")
    added = [layer.added[n] for n in "qkv"]
    weights = GROUPED.join([layer.bases[n].weight.grad for n in "qkv"])
    downs = sum(one.down.weight.grad for one in added)  # one matrix there, three equal ones here
    ups = GROUPED.join([one.up.weight.grad for one in added])
    for found, name in ((weights, "weight"), (downs, "Plora_A.weight"), (ups, "Plora_B.weight")):
        torch.testing.assert_close(found, tensors[f"gradp.{name}"], **GRADIENTS)
    nobody = layer(x, torch.empty(0, dtype=torch.long)) + bias
    torch.testing.assert_close(nobody, tensors["output_no_image"], **VALUES)


ROLES = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
LLAMA = {"self_attn.language_expert_dense": "self_attn.o_proj"}
LLAMA |= {f"mlp.language_mlp.{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")}


class Chosen(nn.Module):
    """A routed linear layer with its tokens, as a language model calls it."""

    def __init__(self, base, expert, rows):
        super().__init__()
        self.routed, self.rows = TokenRoutedLinear(base, expert, replaces=True), rows

    def forward(self, x):
        return self.routed(x, self.rows)


def llama_layer(state):
    """A layer of Llama with CogVLM's language weights."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=44,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0)
    own = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if name == "self_attn.language_expert_query_key_value":
            parts = value.split([32, 16, 16])
            own |= {f"self_attn.{n}_proj.{kind}": p for n, p in zip("qkv", parts, strict=True)}
        elif ".vision_" not in name:
            own[f"{LLAMA.get(name, name)}.{kind}"] = value
    layer.load_state_dict(own)
    return layer


def linear_at(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(name)


def test_cogvlm_in_a_layer_of_llama():
    tensors = golden("cogvlm_expert_layer")
    state = under(tensors, "param.")
    layer = llama_layer(state)
    experts, names = nn.ModuleDict(), {}
    for name, role in ROLES.items():
        base, own = linear_at(layer, name), key_of(name)
        experts[own] = nn.Linear(base.in_features, base.out_features, bias=role in "qkv")
        names[role] = f"{own}."
    published = {f"model.layers.0.{k}": v for k, v in state.items() if ".vision_" in k}
    load(experts, visual_expert_keys([names], [32, 16, 16], qkv_bias=True), "cogvlm", published)
    rows = tensors["vision_expert_mask"].flatten().nonzero()[:, 0]
    for name in ROLES:
        chosen = Chosen(layer.get_submodule(name), experts[key_of(name)], rows)
        layer.set_submodule(name, chosen)
    x = tensors["hidden_states"].requires_grad_()
    still = torch.ones(1, 8, 8), torch.zeros(1, 8, 8)  # the golden has no rotary positions
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    output = layer(x, attention_mask=causal, position_embeddings=still)
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(output, tensors["output"], **VALUES)
    (output * tensors["cotangent"]).sum().backward()
    check_gradient(x, tensors, "grad.hidden_states")


def test_cogvlm_positions():
    tensors = golden("cogvlm_expert_layer")
    images = tensors["token_type_ids"] - 1
    nothing = torch.zeros_like(images)
    context = FusionContext(images, nothing, nothing, nothing, {}, False)
    found = torch.arange(images.shape[1]) - context.saved_positions
    assert torch.equal(found, tensors["build_position_ids"])
