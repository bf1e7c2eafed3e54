"""Do packed documents attend as with a block-diagonal mask, with windows and grouped heads?"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, MistralConfig

from vlm import packed_attention
from vlm.packed_attention import (
    NAME,
    packed_kind,
    packed_mask,
    use_packed_attention,
    within_documents,
)
from vlm.packed_rows import document_lengths, document_numbers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral, a window of 5": MistralConfig(**SIZES, sliding_window=5),
    "gemma3, one layer of each": Gemma3TextConfig(
        **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}
POSITIONS = torch.tensor([[*range(7), *range(3), *range(12)], [*range(22)]])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_block_diagonal_mask(name, checkpointing):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name]).train().double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 50, POSITIONS.shape)

    def run(mask):
        model.zero_grad()
        out = model(ids, position_ids=POSITIONS, attention_mask=mask, use_cache=False)
        out.last_hidden_state.square().sum().backward()
        return [out.last_hidden_state.detach(), *(p.grad.clone() for p in model.parameters())]

    model.config._attn_implementation = "sdpa"
    expected = run(None)
    use_packed_attention(model)
    mask = packed_mask(model, POSITIONS, None)
    assert mask is not None
    assert mask.shape == (2, 1, 1, 3)
    for ours, theirs in zip(run(mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "kind, facts",
    [
        ("each", {"device_type": "cpu", "dtype": FULL}),
        ("each", {"device_type": "cpu", "dtype": HALF, "triton": True}),
        ("each", {"device_type": "mps", "dtype": HALF}),
        ("varlen", {"dtype": HALF}),
        ("varlen", {"dtype": torch.float16, "triton": True, "capability": (9, 0)}),
        ("varlen", {"dtype": HALF, "head_dims": (256, 256)}),
        ("each", {"dtype": HALF, "head_dims": (264, 264)}),
        ("each", {"dtype": HALF, "head_dims": (192, 128)}),
        ("each", {"dtype": HALF, "head_dims": (60, 60)}),
        ("each", {"dtype": HALF, "dropout": 0.1}),
        ("flex", {"dtype": HALF, "triton": True, "capability": (7, 5)}),
        ("flex", {"dtype": FULL, "triton": True}),
        ("each", {"dtype": FULL, "triton": True, "dropout": 0.1}),
        ("each", {"dtype": FULL}),
    ],
)
def test_which_attention(kind, facts):
    assert packed_kind(**{"device_type": "cuda", "capability": (8, 0), **facts}) == kind


def varlen_by_hand(query, key, value, starts, _, longest, __, *, scale, window_size, enable_gqa):
    """What torch's varlen_attn says it does, one document after the other."""
    assert longest == int(starts.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    found = []
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))  # (H, n, d)
        back, ahead = window_size
        assert ahead == 0
        near = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        near = near if back < 0 else near.triu(-back)
        out = F.scaled_dot_product_attention(q, k, v, near, scale=scale, enable_gqa=True)
        found.append(out.transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_call_for_all_documents(name, monkeypatch):
    torch.manual_seed(0)
    model = use_packed_attention(AutoModel.from_config(CONFIGS[name]).eval().double())
    ids = torch.randint(0, 50, POSITIONS.shape)

    def run():
        mask = packed_mask(model, POSITIONS, None)
        return model(ids, position_ids=POSITIONS, attention_mask=mask).last_hidden_state

    expected, asked = run(), []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    monkeypatch.setattr(
        packed_attention, "packed_kind", lambda *a, **k: asked.append(k) or "varlen"
    )
    torch.testing.assert_close(run(), expected, rtol=1e-8, atol=1e-8)
    assert asked[-1] == {"head_dims": (8, 8), "dropout": 0.0}


def test_what_flex_attention_sees():
    documents = document_numbers(document_lengths(POSITIONS, None))
    assert documents.tolist() == [[0] * 7 + [1] * 3 + [2] * 12, [0] * 22]
    seen = create_mask(within_documents(documents), 2, None, 22, 22, device="cpu")
    blocks = [torch.ones(n, n) for n in (7, 3, 12)]
    assert torch.equal(seen[0, 0], torch.block_diag(*blocks).tril().bool())
    assert torch.equal(seen[1, 0], torch.ones(22, 22).tril().bool())


def test_padded_rows_go_to_sdpa():
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["llama"]).eval()
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    outputs = []
    for name in ("sdpa", NAME):
        model.config._attn_implementation = name
        outputs.append(model(ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(*outputs)


def test_another_attention_is_left_alone():
    model = AutoModel.from_config(CONFIGS["llama"], attn_implementation="eager")
    use_packed_attention(model)
    assert model.config._attn_implementation == "eager"
    assert packed_mask(model, POSITIONS, None) is None


@pytest.mark.parametrize(
    "positions, mask, lengths",
    [
        ([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], None, [[3, 2], [5, 0]]),
        ([[0, 1, 0, 0, 1]], [[1, 1, 1, 0, 0]], [[2, 1, 2]]),
        ([[0, 0, 0, 1, 2]], [[0, 0, 1, 1, 1]], [[2, 3]]),
        ([[0, 1, 0, 0, 1]], [[1, 1, 0, 1, 1]], [[2, 1, 2]]),
        ([[0]], None, [[1]]),
    ],
)
def test_lengths_sum_to_the_row(positions, mask, lengths):
    mask = None if mask is None else torch.tensor(mask)
    assert document_lengths(torch.tensor(positions), mask).tolist() == lengths
