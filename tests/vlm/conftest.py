"""What do the tests of the model share? A mixed batch, and tiny language models with a state."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vlm.loading import assemble

IMAGE = {"type": "image"}
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
RECURRENT = {
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


def talk(num_images: int, question: str, answer: str | None = None) -> list[dict]:
    content = [IMAGE] * num_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.fixture
def rows(make_image):
    """Encode a mixed batch: one image, none, two images."""

    def encode(processor, supervise: bool = True):
        images = [make_image(48, 40, 1), make_image(90, 30, 2), make_image(30, 90, 3)]
        answers = ("A cat.", "Because.", "No, not at all.") if supervise else (None,) * 3
        return [
            processor.encode(
                talk(n, q, a), ims, supervise=supervise, add_generation_prompt=a is None
            )
            for n, q, a, ims in zip(
                (1, 0, 2),
                ("What?", "Why is it so?", "Same?"),
                answers,
                (images[:1], [], images[1:]),
                strict=True,
            )
        ]

    return encode


def _causal_lm(kind: str, **changes) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**COMMON, **RECURRENT.get(kind, ATTENTION), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="session")
def make_causal_lm():
    """(kind, **config) -> a tiny causal LM, its weights moved from where they start."""
    return _causal_lm


@pytest.fixture
def make_with(make_vision_encoder, make_tokenizer):
    """(kind, **config) -> (model, processor) with `make_causal_lm`'s as the language model."""

    def build(kind: str, **changes):
        language_model = _causal_lm(kind, **changes)
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
