"""Does a plain head's loss, and its shared gradient with the embedding, equal autograd's?"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm.head_loss import is_plain, linear_loss
from vlm.lm_head import supervised_loss
from vlm.tied_head import look_up

ROWS, DIM, WORDS = 7, 6, 11


def losses(chunk_rows: int, scaled: bool, bias: bool, dtype=torch.float32):
    """Our loss and gradients, and those of all logits at once."""
    torch.manual_seed(0)
    head = nn.Linear(DIM, WORDS, bias=bias).to(dtype)
    rows, targets = torch.randn(ROWS, DIM, dtype=dtype), torch.randint(0, WORDS, (ROWS,))
    scales = torch.rand(ROWS) if scaled else None
    results = []
    for ours in (True, False):
        head.zero_grad()
        states = rows.clone().requires_grad_()
        if ours:
            loss = linear_loss(states, head.weight, head.bias, targets, scales, 3.0, chunk_rows)
        else:
            each = F.cross_entropy(head(states).float(), targets, reduction="none")
            loss = (each if scales is None else each * scales).sum() / 3.0
        (2.0 * loss).backward()
        results.append([loss.detach(), states.grad, *(p.grad for p in head.parameters())])
    return results


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_head_learns_as_from_all_logits(chunk_rows, scaled, bias) -> None:
    for ours, expected in zip(*losses(chunk_rows, scaled, bias), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_lower_types(chunk_rows) -> None:
    """In bfloat16 throughout, and under autocast, where the weights stay float32."""
    for ours, expected in zip(*losses(chunk_rows, False, True, torch.bfloat16), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(*losses(chunk_rows, True, False), strict=True):
            assert ours.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on() -> None:
    head = nn.Linear(DIM, WORDS).requires_grad_(False)
    hidden, labels = torch.randn(1, ROWS, DIM, requires_grad=True), torch.arange(ROWS)[None]
    loss = supervised_loss(hidden, labels, head, WORDS)
    loss.backward()
    ours, hidden.grad = hidden.grad, None
    logits = F.linear(hidden[0, :-1], head.weight, head.bias)
    F.cross_entropy(logits, labels[0, 1:]).backward()
    torch.testing.assert_close(ours, hidden.grad)
    assert head.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(hidden, labels, head, WORDS), loss)


def test_heads_that_are_more_than_a_linear_layer_are_not_plain() -> None:
    head = nn.Linear(DIM, WORDS)
    assert is_plain(head)
    head.register_forward_hook(lambda *_: None)
    assert not is_plain(head) and not is_plain(nn.Sequential(nn.Linear(DIM, WORDS)))
    sharded = nn.Linear(DIM, WORDS)
    sharded.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it between two uses
    assert not is_plain(sharded)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_tied_embedding_shares_the_heads_gradient(padding_idx) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(WORDS, DIM, padding_idx=padding_idx)
    head = nn.Linear(DIM, WORDS, bias=False)
    head.weight = embedding.weight
    ids = torch.tensor([[1, 2, 1, 5, 2], [3, 1, 0, 9, 9]])
    gradients = []
    for shared in (True, False):
        embedding.weight.grad = torch.ones_like(embedding.weight)  # of a micro-batch before
        found, weight = look_up(embedding, head, ids) if shared else (embedding(ids), None)
        assert found is not None and shared == (weight is not None)
        loss = supervised_loss(found.tanh(), ids, head, WORDS, head_weight=weight)
        loss.backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_what_is_not_one_matrix_that_learns_shares_nothing(make_model) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    tied, _ = make_model(kind="qwen2", tied=True)
    apart, _ = make_model(kind="qwen2")
    assert look_up(tied.get_input_embeddings(), tied.lm_head, ids)[0] is not None
    assert look_up(apart.get_input_embeddings(), apart.lm_head, ids) == (None, None)
    with torch.no_grad():
        assert look_up(tied.get_input_embeddings(), tied.lm_head, ids) == (None, None)
    tied.enable_input_require_grads()  # PEFT's hook on the embedding's output
    assert look_up(tied.get_input_embeddings(), tied.lm_head, ids) == (None, None)
