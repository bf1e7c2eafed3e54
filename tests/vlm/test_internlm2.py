"""Is an InternLM2 of published names and layout loaded as the same function, and as a host?"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from connectors.checkpoint_keys import from_published
from vlm.errors import UserError
from vlm.internlm2 import internlm2_keys, is_internlm2, llama_config, load_internlm2
from vlm.loading import assemble

CONFIG = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.wqkv, self.wo = nn.Linear(32, 64, bias=bias), nn.Linear(32, 32, bias=bias)

    def forward(self, x, rotary):
        # As published: 'b q (h gs d) -> b q h gs d', the last two of a group are key and value.
        groups = self.wqkv(x).unflatten(-1, (2, 4, 8))
        query = groups[..., :2, :].flatten(2, 3).transpose(1, 2)
        key, value = groups[..., -2, :].transpose(1, 2), groups[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        found = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(found.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(32, 48, bias=False) for _ in range(2))
        self.w2 = nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.attention, self.feed_forward = Attention(bias), FeedForward()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(32, eps=1e-5) for _ in range(2))

    def forward(self, x, rotary):
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.feed_forward(self.ffn_norm(x))


class Published(nn.Module):
    """The published modelling file's names and order of computation, written anew."""

    def __init__(self, bias):
        super().__init__()
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(259, 32)
        self.model.layers = nn.ModuleList(Layer(bias) for _ in range(2))
        self.model.norm = nn.RMSNorm(32, eps=1e-5)
        self.output = nn.Linear(32, 259, bias=False)

    def forward(self, ids):
        x = self.model.tok_embeddings(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = LlamaRotaryEmbedding(llama_config(CONFIG))(x, positions)
        for layer in self.model.layers:
            x = layer(x, rotary)
        return self.output(self.model.norm(x))


def publish(folder, bias=False, shards=2, **changes):
    torch.manual_seed(0)
    model = Published(bias)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    items = list(model.state_dict().items())
    folder.mkdir(exist_ok=True)
    for i in range(shards):
        save_file(dict(items[i::shards]), folder / f"model-{i + 1:05}-of-{shards:05}.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "bias": bias, **changes}))
    return model


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_it_is_the_same_function(bias, tmp_path) -> None:
    published = publish(tmp_path, bias)
    assert is_internlm2(tmp_path)
    model = load_internlm2(tmp_path).eval()
    ids = torch.randint(0, 259, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, published(ids), rtol=1e-5, atol=1e-5)
    assert model.config.rope_parameters["rope_type"] == "dynamic"
    assert model.config.rope_parameters["factor"] == 2.0


def test_it_is_a_host_as_llama_is(tmp_path, make_vision_encoder, make_tokenizer, rows) -> None:
    publish(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    connector = [{"type": "mlp"}, {"type": "partial_lora", "rank": 3, "dropout": 0.0}]
    model, processor = assemble(make_vision_encoder(), connector, tmp_path, chat_template="chatml")
    lora = model.model.connector.parts[1]
    published = {}
    for i in range(2):
        for linear, (inner, outer) in {
            "attention.wqkv": (32, 64),
            "attention.wo": (32, 32),
            "feed_forward.w1": (32, 48),
            "feed_forward.w3": (32, 48),
            "feed_forward.w2": (48, 32),
        }.items():
            place = f"model.layers.{i}.{linear}.Plora_"
            published |= {f"{place}A.weight": torch.randn(3, inner)}
            published |= {f"{place}B.weight": torch.randn(outer, 3)}
    lora.load_state_dict(from_published(lora, published))
    batch = processor.collate(rows(processor), "right")
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    asked = processor.collate(rows(processor, supervise=False), "left")
    options = {"max_new_tokens": 3, "do_sample": False}
    model.eval()
    cached = model.generate(**asked, **options)
    assert torch.equal(cached, model.generate(**asked, **options, use_cache=False))


def test_what_is_not_as_the_config_says_is_refused(tmp_path) -> None:
    publish(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"7 weights, such as model\.layers\.2.*, stand in one"):
        load_internlm2(tmp_path / "deeper")
    publish(tmp_path / "empty", shards=0)
    with pytest.raises(UserError, match=r"has no \*\.safetensors file"):
        load_internlm2(tmp_path / "empty")


def test_every_weight_of_llama_is_named_once() -> None:
    table = internlm2_keys(llama_config(CONFIG))
    names = [
        n for ours in table.values() for n in ([ours] if isinstance(ours, str) else ours.names)
    ]
    assert len(names) == len(set(names)) == 3 + 2 * 9
