"""Does the head give the loss of full logits, and every language model's own logits?"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from vlm import lm_head
from vlm.errors import UserError
from vlm.lm_head import supervised_loss
from vlm.loading import assemble
from vlm.modeling import VlmForConditionalGeneration

KINDS = [("llama", False), ("llama", True), ("qwen2", True), ("gpt_neox", False), ("gpt2", True)]
ANYRES = {"type": "anyres"}


def full_loss(model, batch, num_items=None):
    """The loss as transformers has it: all logits, then cross-entropy."""
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / ((labels != -100).sum() if num_items is None else num_items)


@pytest.mark.parametrize("kind, tied", KINDS)
def test_loss_and_gradients_equal_those_of_full_logits(kind, tied, make_model, rows) -> None:
    model, processor = make_model(tiling=ANYRES, kind=kind, tied=tied)
    batch = processor.collate(rows(processor), "right")
    output = model(**batch)
    assert output.logits is None
    output.loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = full_loss(model, batch)
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert any("vision_tower" in name for name in ours) and "model.image_newline" in ours
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk_rows", [1, 2, 7])
def test_chunks_change_neither_loss_nor_gradients_nor_hold_all_logits(chunk_rows) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 9, 6), torch.randint(0, 11, (2, 9))
    labels[0, :5] = labels[1, 6:] = -100
    head = torch.nn.Linear(6, 11)
    seen = []

    def watched(chunk):
        seen.append(len(chunk))
        return head(chunk)

    results = []
    for elements in (2**20, chunk_rows * 11):
        seen.clear()
        states = hidden.clone().requires_grad_()
        loss = supervised_loss(states, labels, watched, 11, chunk_elements=elements)
        head.zero_grad()
        loss.backward()
        results.append((loss.detach(), states.grad, head.weight.grad.clone()))
    assert max(seen) == chunk_rows
    supervised = int((labels[:, 1:] != -100).sum())
    assert sum(seen) == 2 * supervised  # each once more in the backward pass
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_elements", [2**20, 22])
@pytest.mark.parametrize("num_items", [None, 7.0])
def test_weighted_losses(chunk_elements, num_items) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 6, 3), torch.nn.Linear(3, 11)
    labels = torch.randint(0, 11, (2, 6))
    labels[0, :3] = labels[1, 4:] = -100
    weights = torch.rand(2, 6)
    loss = supervised_loss(
        hidden, labels, head, 11, num_items, weights=weights, chunk_elements=chunk_elements
    )
    each = F.cross_entropy(
        head(hidden[:, :-1]).transpose(1, 2), labels[:, 1:], reduction="none"
    )  # 0 where the label is -100
    of = weights[:, 1:] * (labels[:, 1:] != -100)
    torch.testing.assert_close(loss, (each * of).sum() / (num_items or of.sum()))


def test_num_items_divides_the_sum(make_model, rows) -> None:
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    for items in (100, torch.tensor(100)):
        loss = model(**batch, num_items_in_batch=items).loss
        torch.testing.assert_close(loss, full_loss(model, batch, 100))


def test_a_batch_without_anything_to_learn_has_zero_loss(make_model, rows) -> None:
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0


def test_a_packed_document_is_not_asked_for_the_next_ones_first_token() -> None:
    hidden, head = torch.randn(1, 4, 3), torch.nn.Linear(3, 5)
    labels = torch.tensor([[-100, 1, 2, 3]])  # the second document, [2, 3], is all labels
    starts = lm_head.document_starts(torch.tensor([[0, 1, 0, 1]]), None)
    loss = supervised_loss(hidden, labels, head, 5, 1, starts)
    kept = torch.tensor([0, 2])
    expected = F.cross_entropy(head(hidden[0, kept]), torch.tensor([1, 3]), reduction="sum")
    torch.testing.assert_close(loss, expected)


HEADS = {
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.3},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "phi": {},  # a bias
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_with_rules_of_their_own(
    kind, make_vision_encoder, make_tokenizer, rows, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        kind,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **HEADS[kind],
    )
    language_model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(language_model.get_output_embeddings().weight, std=2.0)
    ids = torch.arange(5)[None]
    expected = language_model(ids).logits
    model, processor = assemble(
        make_vision_encoder(),
        {"type": "mlp"},
        language_model,
        tokenizer=make_tokenizer(),
        chat_template="chatml",
    )
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
    batch = processor.collate(rows(processor), "right")
    torch.testing.assert_close(model(**batch).loss, full_loss(model, batch))
    model.save_pretrained(tmp_path)
    again = VlmForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_a_head_with_an_unknown_rule_is_refused(
    make_vision_encoder, make_language_model, monkeypatch
) -> None:
    language_model = make_language_model()
    forward = type(language_model).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 3 + 1
        return output

    monkeypatch.setattr(type(language_model), "forward", scaled)
    with pytest.raises(UserError, match="does more to its logits"):
        VlmForConditionalGeneration.from_components(
            make_vision_encoder(), {"type": "mlp"}, language_model, {"type": "resize"}, 1, 259
        )
