"""Do packed documents attend as with a block-diagonal mask, with windows and grouped heads?"""

import pytest
import torch
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, MistralConfig

from vlm.packed_attention import NAME, packed_mask, use_packed_attention
from vlm.packed_rows import document_lengths

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
