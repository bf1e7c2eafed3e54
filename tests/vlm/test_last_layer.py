"""Is a step the same when the last layer leaves out tokens from which nothing is learnt?"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm.hosts import HOSTS
from vlm.last_layer import ARGUMENT, LastLayer
from vlm.lean_layers import learn_lean
from vlm.lm_head import logit_transform, supervised, supervised_loss

ANYRES = {"type": "anyres"}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def step(model, batch, rows=True):
    """The loss and all gradients, with or without leaving rows out."""
    model.zero_grad()
    if not rows:
        model._last_layer.ask = lambda *_: {}
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def seen_by(module):
    """Notes how many tokens the module is given."""
    counts = []
    module.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:-1].numel()))
    return counts


@pytest.mark.parametrize("family", sorted(set(HOSTS) - {"internlm3"}))  # its code is a download
def test_every_family_learns_as_all_its_logits_would_have_it(family):
    """The last layer, the lean layers and the head's loss, against transformers' own class."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).train()
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no norm of ones
    ids = torch.arange(1, 19).reshape(2, 9)
    labels = ids.clone()
    labels[0, :6] = labels[1, 3:] = -100
    ours = copy.deepcopy(plain)
    learn_lean(ours.model)
    rows = LastLayer().ask(ours.model, supervised(labels, None), {})
    hidden = ours.model(ids, use_cache=False, **rows).last_hidden_state
    transform = logit_transform(ours.config)
    head = ours.lm_head if transform is None else (lambda x: transform(ours.lm_head(x)))
    found = supervised_loss(hidden, labels, head, SIZES["vocab_size"])
    expected = plain(ids, labels=labels, use_cache=False).loss
    assert rows and found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    for (name, one), (_, other) in zip(
        ours.named_parameters(), plain.named_parameters(), strict=True
    ):
        distance = (one.grad - other.grad).norm()
        assert distance <= 1e-5 * other.grad.norm(), name


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [None, {}, {"keep": "products"}, {"use_reentrant": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_all_rows(make_model, rows, kind, options, packed):
    model, processor = make_model(kind=kind, tiling=ANYRES)
    encoded = rows(processor)
    batch = processor.pack(encoded) if packed else processor.collate(encoded, "right")
    model.train()
    if options is not None:
        model.activation_checkpointing_enable(options)
    other = copy.deepcopy(model)
    expected = step(other, batch, rows=False)
    found = step(model, batch)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_supervised_rows_are_computed(make_model, rows):
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    layers = model.model.language_model.layers
    model(**batch)
    last, first = seen_by(layers[-1].mlp.up_proj), seen_by(layers[0].mlp.up_proj)
    behind = seen_by(layers[-1].self_attn.o_proj)  # asked after the hook that takes rows
    model(**batch)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert last == behind == [supervised] and first == [batch["labels"].numel()]
    del batch["labels"]
    model(**batch)  # logits of every position
    assert last[1:] == [batch["input_ids"].numel()]


def test_two_passes_before_their_gradients_do_not_mix(make_model, rows):
    """A checkpointed layer is computed again with the rows of its own pass."""
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    other = {**batch, "labels": batch["labels"].roll(1, -1)}
    model.train()
    apart = [step(model, b) for b in (batch, other)]
    model.activation_checkpointing_enable()
    model.zero_grad()
    (model(**batch).loss + model(**other).loss).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for grad, a, b in zip(grads, apart[0][1:], apart[1][1:], strict=True):
        torch.testing.assert_close(grad, a + b, rtol=1e-5, atol=1e-6)


def test_a_batch_without_answers_reaches_every_parameter(make_model, rows):
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    everything = step(model, batch)
    assert len(everything) == 1 + len(list(model.parameters()))
    assert everything[0] == 0


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_shown_states_are_whole(make_model, rows, name):
    model, processor = make_model()
    language_model, learnt = model.model.language_model, torch.ones(1, 4, dtype=torch.bool)
    assert not LastLayer().ask(language_model, learnt, {name: True})
    assert LastLayer().ask(language_model, learnt, {})[ARGUMENT].tolist() == [0, 1, 2, 3]
    batch = processor.collate(rows(processor), "right")
    shown = model(**batch, output_hidden_states=True).hidden_states[-1]
    del batch["labels"]
    torch.testing.assert_close(shown, model(**batch, output_hidden_states=True).hidden_states[-1])


def test_other_families_see_all_rows():
    model = AutoModel.from_config(AutoConfig.for_model("gpt_neox", **TINY))
    assert not LastLayer().ask(model, torch.ones(1, 4, dtype=torch.bool), {})


def test_a_module_that_is_replaced_loses_its_hooks(make_model, rows):
    """As where an adapter wraps a layer after a pass, is merged, and wraps it again."""
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    expected = step(model, batch)[0]
    attention = model.model.language_model.layers[-1].self_attn
    plain = attention.o_proj
    for module in (torch.nn.Sequential(plain), plain, copy.deepcopy(plain), plain):
        attention.o_proj = module
        torch.testing.assert_close(step(model, batch)[0], expected)


def test_nothing_stays_behind_a_pass(make_model, rows):
    model, processor = make_model()
    model(**processor.collate(rows(processor), "right"))
    mlp = model.model.language_model.layers[-1].mlp
    assert mlp(torch.ones(1, 3, 32)).abs().min() > 0
