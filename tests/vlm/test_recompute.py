"""Do layers that keep their products alone hold less, compute no product twice and learn alike?"""

import pytest
import torch

from train.planning.step import Sample, rehearse
from vlm.errors import UserError
from vlm.recompute import checkpoint_options

KEEP = {"keep": "products"}


def test_gradients_are_those_of_kept_activations(make_model, rows) -> None:
    model, processor = make_model(kind="qwen2", tied=True)
    batch = processor.collate(rows(processor), "right")
    model.train()
    results = []
    for keep in (False, True):
        if keep:
            model.activation_checkpointing_enable(KEEP)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_no_product_is_computed_again(make_model) -> None:
    model, _ = make_model(kind="qwen2")
    model.train().to("meta")
    costs = {}
    for name, options in (("all", None), ("products", KEEP), ("inputs", {})):
        if options is not None:
            model.activation_checkpointing_enable(options or None)
        costs[name] = rehearse(model, Sample(((48, 40),), 20, 9), 3)
    assert costs["products"].recomputed == costs["all"].recomputed == 0 < costs["inputs"].recomputed
    held = [costs[name].activations for name in ("inputs", "products", "all")]
    assert held == sorted(held) and len(set(held)) == 3


def test_the_embedding_gets_no_hook_that_only_reentrant_checkpoints_need(make_model) -> None:
    model, _ = make_model()
    model.activation_checkpointing_enable()
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("options", [{"keep": "all"}, {**KEEP, "use_reentrant": True}])
def test_other_choices_are_refused(options) -> None:
    with pytest.raises(UserError, match="keep can only be products"):
        checkpoint_options(options)
