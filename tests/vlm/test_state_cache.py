"""Which language models carry a state, what cache holds it, and which are refused?"""

import pytest
import torch

from vlm.errors import UserError
from vlm.recurrent_lm import run
from vlm.state_cache import StateCache, new_cache, state_traits

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
PURE = ("mamba", "falcon_mamba", "mamba2", "xlstm")
HYBRID = ("jamba", "zamba", "zamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h")
HYBRID += ("qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("kind", PURE + HYBRID)
def test_every_kind_is_told_by_its_config_not_its_name(kind, make_causal_lm) -> None:
    traits = state_traits(make_causal_lm(kind).base_model)
    assert traits is not None
    assert (traits.cache_name == "cache_params") == (kind in PURE) == (not traits.has_keys)
    assert traits.own_cache == (kind == "xlstm")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "mistral", "gemma2"])
def test_attention_alone_has_no_state(kind, make_causal_lm) -> None:
    assert state_traits(make_causal_lm(kind).base_model) is None


def test_a_hybrid_without_attention_layers_has_no_keys(make_causal_lm, make_with, rows) -> None:
    traits = state_traits(make_causal_lm("bamba", attn_layer_indices=[]).base_model)
    assert traits is not None and not traits.has_keys
    model, processor = make_with("bamba", attn_layer_indices=[])
    batch = processor.collate(rows(processor, supervise=False), "left")
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))


REFUSED = {
    "recurrent_gemma": (
        {"num_hidden_layers": 3, "lru_width": 32, "intermediate_size": 96},
        "RecurrentGemmaModel .* keeps its state in its layers",
    ),
    "minimax": (
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
        },
        "MiniMaxModel .* cache of its own",
    ),
    "rwkv": (
        {"num_key_value_heads": 4, "attention_hidden_size": 32},
        "RwkvModel .* neither as past_key_values nor as cache_params",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_hand_no_state_on_are_refused(kind, make_with) -> None:
    changes, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=sentence):
        make_with(kind, **ATTENTION | changes)


@pytest.mark.parametrize("kind, stateful", [("mamba", True), ("jamba", True), ("llama", False)])
def test_drafts_that_must_be_taken_back_are_refused(kind, stateful, make_with, rows) -> None:
    model, processor = make_with(kind)
    batch = processor.collate(rows(processor, supervise=False)[1:2], "left")
    if stateful:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2)
    else:
        model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2)


def test_training_keeps_no_cache(make_causal_lm) -> None:
    language_model = make_causal_lm("xlstm").base_model
    traits = state_traits(language_model)
    assert traits is not None
    embeds = torch.randn(1, 4, 128)
    assert isinstance(new_cache(language_model, traits), StateCache)
    output = run(language_model.train(), traits, embeds, use_cache=True)
    assert output.past_key_values is None
    assert output.last_hidden_state is not None
    output.last_hidden_state.sum().backward()
    output = run(language_model.eval(), traits, embeds)
    assert output.past_key_values is not None
    assert output.past_key_values.get_seq_length() == 4
