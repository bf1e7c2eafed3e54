"""How is InternLM2 loaded, which transformers does not have? As the Llama that it is.

The modelling file that comes with its weights is code from the hub, for an older transformers: its
caches are tuples, and its layers take no further arguments, which connectors inside the language
model need. Its layers are Llama's but for two things: the weights' names, and queries, keys and
values in one `wqkv`, whose rows stand in groups of heads. Both are changed on loading, so that
everything that works with Llama works with it; what is saved is a Llama.

Its tokenizer is code from the hub too: a folder needs a `tokenizer.json` beside the weights.

Follows `modeling_internlm2.py` of internlm/internlm2-7b.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from connectors.checkpoint_keys import translate
from connectors.key_table import GroupedHeads, Layout
from vlm.errors import UserError

_SAME = (  # fields with the same name and meaning in Llama's config
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


def is_internlm2(source: str | Path) -> bool:
    """Return whether a folder or Hub id holds an InternLM2.

    Raises:
        OSError: there is no config.
    """
    values, _ = PreTrainedConfig.get_config_dict(str(source))
    return values.get("model_type") == "internlm2"


def load_internlm2(source: str | Path) -> LlamaForCausalLM:
    """Return the language model of a folder or Hub id, in the type its config names.

    Raises:
        UserError: it has no safetensors files, or their weights are not those of its config.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    values, _ = PreTrainedConfig.get_config_dict(str(folder))
    state = {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
    if not state:
        raise UserError(f"the language model {source} has no *.safetensors file")
    config = llama_config(values)
    table = internlm2_keys(config)
    state = {key: value for key, value in state.items() if not key.endswith(".inv_freq")}
    if wrong := sorted(set(table) ^ set(state)):
        raise UserError(
            f"the language model {source} is no InternLM2 as its config.json has it: {len(wrong)} "
            f"weights, such as {wrong[0]}, stand in one of the two only"
        )
    dtype = getattr(torch, values.get("torch_dtype") or values.get("dtype") or "float32")
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=translate(table, state), dtype=dtype
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def llama_config(values: Mapping[str, Any]) -> LlamaConfig:
    """Return Llama's config for the values of an InternLM2 `config.json`."""
    same = {name: values[name] for name in _SAME if name in values}
    return LlamaConfig(**same, attention_bias=values.get("bias", True))


def internlm2_keys(config: LlamaConfig) -> dict[str, str | Layout]:
    """Return {published key: Llama's} of all weights."""
    keys: dict[str, str | Layout] = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        keys["output.weight"] = "lm_head.weight"
    renamed = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert heads is not None
    for i in range(config.num_hidden_layers):
        place = f"model.layers.{i}."
        keys |= {
            f"{place}{theirs}.weight": f"{place}{ours}.weight" for theirs, ours in renamed.items()
        }
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            q, k, v = (f"{place}self_attn.{n}_proj.{kind}" for n in "qkv")
            keys[f"{place}attention.wqkv.{kind}"] = GroupedHeads(q, k, v, heads, head_dim)
            keys[f"{place}attention.wo.{kind}"] = f"{place}self_attn.o_proj.{kind}"
    return keys
