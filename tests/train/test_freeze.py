"""Has every parameter one owner, trains what is named, and do norms and biases not decay?"""

import pytest
import torch

from train.freeze import describe, freeze, optimizer_groups, owner
from vlm.encoders import build_vision_encoder


def test_named_parts_train_and_the_rest_does_not(make_model):
    model, _ = make_model(tiling={"type": "anyres"})
    freeze(model, {"connector": 1e-3})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.image_newline" in trained
    assert all(name.startswith(("model.connector.", "model.image_newline")) for name in trained)
    freeze(model, {"language_model": 1e-3, "vision_tower": 1e-5})
    assert not any(p.requires_grad for p in model.model.connector.parameters())
    assert model.lm_head.weight.requires_grad


def test_row_ends_train_with_the_connector(make_model):
    model, _ = make_model(tiling={"type": "hd"})
    freeze(model, {"connector": 1e-3})
    assert model.model.image_newline.requires_grad and model.model.image_separator.requires_grad
    freeze(model, {"language_model": 1e-3})
    assert not any(p.requires_grad for p in model.model.parameters(recurse=False))


@pytest.mark.parametrize("tied", [False, True])
def test_every_trainable_parameter_is_in_one_group(make_model, tied):
    model, _ = make_model(tiling={"type": "anyres"}, tied=tied)
    rates = {"connector": 1e-3, "language_model": 2e-5, "vision_tower": 2e-6}
    groups = optimizer_groups(model, freeze(model, rates), weight_decay=0.1)
    parameters = [id(p) for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {id(p) for p in model.parameters()}
    for group in groups:
        assert group["lr"] == rates[group["part"]]
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim >= 2)
    assert torch.optim.AdamW(groups).param_groups[0]["lr"] in rates.values()


def test_what_a_module_exempts_does_not_decay(make_model):
    architecture = {"embed_dim": 16, "depth": 1, "patch_size": 8}
    model, _ = make_model()
    vim = {"type": "vim", "image_size": 32, "architecture": architecture}
    model.model.vision_tower = build_vision_encoder(vim)
    groups = freeze(model, {"vision_tower": 1e-3})
    still = {
        name.rsplit(".", 1)[-1] for group in groups if not group.decays for name in group.names
    }
    assert {"A_log", "A_b_log", "pos_embed", "cls_token"} <= still
    decayed = {name for group in groups if group.decays for name in group.names}
    assert any(name.endswith("in_proj.weight") for name in decayed)


def test_a_parameter_without_an_owner_is_a_bug(make_model):
    with pytest.raises(AssertionError, match="exactly one"):
        owner("model.something.weight")
    model, _ = make_model()
    groups = freeze(model, {"connector": 1e-3})
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="exactly one group"):
        optimizer_groups(model, groups, 0.0)


def test_description_names_every_part(make_model):
    model, _ = make_model()
    lines = list(describe(model, {"connector": 1e-3}))
    assert [line.split()[0] for line in lines] == ["vision_tower", "connector", "language_model"]
    assert "frozen" in lines[0]
    assert "trains at 0.001" in lines[1]
