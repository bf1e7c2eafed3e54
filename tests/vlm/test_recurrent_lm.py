"""Do language models with a state do what the others do: batched, cached, packed, saved?"""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlm.errors import UserError
from vlm.loading import assemble
from vlm.recurrent_lm import run
from vlm.state_cache import StateCache, new_cache, state_traits

COMMON = {
    "vocab_size": 259,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_size": 32,
    "num_hidden_layers": 2,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA1 = {"state_size": 4, "time_step_rank": 3}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
DELTA_NET = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
KINDS = {
    "mamba": MAMBA1,
    "falcon_mamba": MAMBA1,
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "xlstm": {
        "hidden_size": 128,
        "num_heads": 2,
        "num_blocks": 2,
        "chunk_size": 16,
        "ffn_round_up_to_multiple_of": 8,
    },
    "jamba": {
        **ATTENTION,
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
    },
    "zamba": {
        **ATTENTION,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "attention_head_dim": 16,
    },
    "zamba2": {
        **ATTENTION,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
    },
    "bamba": {**ATTENTION, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**ATTENTION, **MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "granitemoehybrid": {
        **ATTENTION,
        **MAMBA2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "logits_scaling": 4.0,
    },
    "nemotron_h": {
        **ATTENTION,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "qwen3_next": {
        **ATTENTION,
        **EXPERTS,
        **DELTA_NET,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {**ATTENTION, **DELTA_NET},
    "olmo_hybrid": {**ATTENTION, **DELTA_NET},
    "lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"]},
}
PURE = ("mamba", "falcon_mamba", "mamba2", "xlstm")
SOME = ("mamba", "mamba2", "xlstm", "jamba", "qwen3_next")  # one of each construction
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def causal_lm(kind: str, **changes):
    """A tiny model whose weights are far from their start, where biases and gates do nothing."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS.get(kind, ATTENTION), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def make(make_vision_encoder, make_tokenizer):
    """(kind, **changes of its config) -> (model, processor) with it as the language model."""

    def build(kind: str, **changes):
        language_model = causal_lm(kind, **changes)
        torch.manual_seed(2)
        model, processor = assemble(
            make_vision_encoder(),
            {"type": "mlp"},
            language_model,
            tiling={"type": "anyres"},
            tokenizer=make_tokenizer(),
            chat_template="chatml",
        )
        return model.eval(), processor

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_by_its_config_not_its_name(kind) -> None:
    traits = state_traits(causal_lm(kind).base_model)
    assert traits is not None
    assert (traits.cache_name == "cache_params") == (kind in PURE) == (not traits.has_keys)
    assert traits.own_cache == (kind == "xlstm")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "mistral", "gemma2"])
def test_attention_alone_has_no_state(kind) -> None:
    assert state_traits(causal_lm(kind).base_model) is None


def test_a_hybrid_without_attention_layers_has_no_keys(make, rows) -> None:
    assert not state_traits(causal_lm("bamba", attn_layer_indices=[]).base_model).has_keys
    model, processor = make("bamba", attn_layer_indices=[])
    batch = processor.collate(rows(processor, supervise=False), "left")
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_lowers_the_loss(kind, make, rows) -> None:
    model, processor = make(kind)
    batch = processor.collate(rows(processor), "right")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = model(**batch).loss
    loss.backward()
    for part in (model.model.language_model, model.model.connector, model.lm_head):
        assert all(p.grad is not None for p in part.parameters())
    optimizer.step()
    assert model(**batch).loss < loss - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_cached_and_not_in_a_batch_and_alone(kind, make, rows) -> None:
    model, processor = make(kind)
    asked = rows(processor, supervise=False)  # one image, none, two images: three lengths
    batch = processor.collate(asked, "left")
    assert (batch["attention_mask"] == 0).any()
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, reply in zip(asked, together, strict=True):
        alone = processor.collate([row], "left")
        cached = model.generate(**alone, **GREEDY)[0, len(row["input_ids"]) :]
        assert torch.equal(reply[: len(cached)], cached)
        full_passes = model.generate(**alone, **GREEDY, use_cache=False)
        assert torch.equal(full_passes[0, len(row["input_ids"]) :], cached)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_logits(kind, make, rows) -> None:
    model, processor = make(kind)
    asked = rows(processor, supervise=False)
    alone = [model(**processor.collate([row], "left")).logits[0] for row in asked]
    for side in ("left", "right"):
        batch = processor.collate(asked, side)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits
        for row, mask, expected in zip(logits, batch["attention_mask"].bool(), alone, strict=True):
            torch.testing.assert_close(row[mask], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_after_a_cache_equal_a_full_pass(kind, make) -> None:
    # transformers' own Mamba-1 starts from an empty state here and says nothing.
    model, _ = make(kind)
    ids = torch.randint(3, 250, (2, 24))
    logits, cache = [], None
    for start, end in ((0, 10), (10, 17), (17, 18), (18, 24)):
        output = model(
            input_ids=ids[:, start:end],
            position_ids=torch.arange(start, end)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
        assert cache.get_seq_length() == end
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", SOME)
def test_beams_and_several_replies_keep_their_images_and_states(kind, make, rows) -> None:
    model, processor = make(kind)
    asked = rows(processor, supervise=False)
    batch = processor.collate(asked, "left")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch, **options, num_return_sequences=2)
    full_passes = model.generate(**batch, **options, num_return_sequences=2, use_cache=False)
    assert torch.equal(together, full_passes)
    start = batch["input_ids"].shape[1]
    for i, row in enumerate(asked):
        alone = model.generate(**processor.collate([row], "left"), **options)
        alone = alone[0, len(row["input_ids"]) :]
        assert torch.equal(together[2 * i, start:][: len(alone)], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind, make, rows) -> None:
    model, processor = make(kind)
    separate = rows(processor)
    packed = {
        key: torch.cat([row[key] for row in separate if key in row])
        for key in ("pixel_values", "tile_grids", "image_sizes")
    }
    packed["input_ids"] = torch.cat([row["input_ids"] for row in separate])[None]
    labels = torch.cat([row["labels"] for row in separate])[None]
    positions = [torch.arange(len(row["input_ids"])) for row in separate]
    packed["position_ids"] = torch.cat(positions)[None]
    asked = [{k: v for k, v in row.items() if k != "labels"} for row in separate]
    alone = [model(**processor.collate([row], "right")).logits[0] for row in asked]
    for mask in (None, torch.ones_like(packed["input_ids"])):
        logits = model(**packed, attention_mask=mask).logits[0]
        torch.testing.assert_close(logits, torch.cat(alone), rtol=2e-5, atol=2e-5)
    together = model.train()(**packed, labels=labels, num_items_in_batch=1).loss
    each = sum(
        model(**processor.collate([row], "right"), num_items_in_batch=1).loss for row in separate
    )
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_models_are_equal(kind, make, rows, tmp_path: Path) -> None:
    model, processor = make(kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    batch = processor.collate(rows(processor, supervise=False), "left")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("kind", SOME)
def test_gradient_checkpointing_changes_no_gradient(kind, make, rows) -> None:
    model, processor = make(kind)
    batch = processor.collate(rows(processor), "right")
    results = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SOME)
def test_embeddings_instead_of_ids_and_the_last_logits_alone(kind, make, rows) -> None:
    model, processor = make(kind)
    batch = processor.collate(rows(processor, supervise=False), "left")
    logits = model(**batch).logits
    kept = model(**batch, logits_to_keep=1).logits
    torch.testing.assert_close(kept, logits[:, -1:], rtol=1e-5, atol=1e-5)
    ids = rows(processor, supervise=False)[1]["input_ids"][None]
    mask = torch.ones_like(ids)
    embeds = model.get_input_embeddings()(ids)
    ours = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    theirs = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours[0], theirs[0, ids.shape[1] :])


@pytest.mark.parametrize("kind", SOME)
def test_bfloat16(kind, make, rows) -> None:
    model, processor = make(kind)
    batch = processor.collate(rows(processor), "right")
    exact = model(**batch).loss
    model.to(torch.bfloat16)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)
    asked = processor.collate(rows(processor, supervise=False), "left")
    assert model.generate(**asked, **GREEDY).shape[1] > asked["input_ids"].shape[1]


def test_padding_that_reaches_the_state_is_refused(make, rows) -> None:
    # With biases, xLSTM makes something of embeddings of zero, and it takes no mask.
    model, processor = make("xlstm", use_bias=True)
    asked = rows(processor, supervise=False)
    with pytest.raises(UserError, match=r"xLSTMModel lets padding on the left .* one row at a"):
        model.generate(**processor.collate(asked, "left"), **GREEDY)
    model.generate(**processor.collate(asked[:1], "left"), **GREEDY)
    model.train()
    with pytest.raises(UserError, match="xLSTMModel lets padding"):
        model(**processor.collate(asked, "left"))
    assert all(module.training for module in model.model.language_model.modules())


def test_padding_after_a_token_is_refused_where_the_state_goes_on(make, rows) -> None:
    model, processor = make("mamba")
    batch = processor.collate(rows(processor, supervise=False), "right")
    model(**batch)  # no cache: what follows a row's end is read by nobody
    with pytest.raises(UserError, match=r"MambaModel .* pad the rows on the left"):
        model.generate(**batch, **GREEDY)
    ids, mask = torch.arange(3, 9)[None], torch.tensor([[1, 1, 0, 0, 1, 1]])
    with pytest.raises(UserError, match="MambaModel"):
        model(input_ids=ids, attention_mask=mask)


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
def test_models_that_hand_no_state_on_are_refused(kind, make) -> None:
    changes, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=sentence):
        make(kind, **ATTENTION | changes)


@pytest.mark.parametrize("kind, stateful", [("mamba", True), ("jamba", True), ("llama", False)])
def test_drafts_that_must_be_taken_back_are_refused(kind, stateful, make, rows) -> None:
    model, processor = make(kind)
    batch = processor.collate(rows(processor, supervise=False)[1:2], "left")
    if stateful:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2)
    else:
        model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2)


def test_training_keeps_no_cache() -> None:
    language_model = causal_lm("xlstm").base_model
    traits = state_traits(language_model)
    embeds = torch.randn(1, 4, 128)
    assert isinstance(new_cache(language_model, traits), StateCache)
    output = run(language_model.train(), traits, embeds, use_cache=True)
    assert output.past_key_values is None
    output.last_hidden_state.sum().backward()
    output = run(language_model.eval(), traits, embeds)
    assert output.past_key_values.get_seq_length() == 4


def test_hidden_states_of_packed_documents_are_put_back(make) -> None:
    model, _ = make("mamba")
    ids = torch.randint(3, 250, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(input_ids=ids, position_ids=positions, output_hidden_states=True).hidden_states
    alone = model(input_ids=ids[:, 4:], output_hidden_states=True).hidden_states
    assert len(packed) == len(alone) == 3
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours[:, 4:], theirs)
