"""Has every parameter one owner, trains what is named, and do norms and biases not decay?"""

import pytest
import torch

from train.freeze import describe, freeze, optimizer_groups, owner
from train.rates import PartRates
from vlm.encoders import build_vision_encoder
from vlm.errors import UserError


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


def test_rates_by_layer(make_model):
    model, _ = make_model()
    rates = PartRates(learning_rate=1e-2, layer_decay=0.5, weight_decay=0.3)
    groups = freeze(model, {"language_model": rates, "connector": 1e-3})
    peaks = {name: group.learning_rate for group in groups for name in group.names}
    assert peaks["model.language_model.embed_tokens.weight"] == 1e-2 / 8
    assert peaks["model.language_model.layers.0.mlp.up_proj.weight"] == 1e-2 / 4
    assert peaks["model.language_model.layers.1.mlp.up_proj.weight"] == 1e-2 / 2
    assert peaks["model.language_model.norm.weight"] == peaks["lm_head.weight"] == 1e-2
    held = optimizer_groups(model, groups, weight_decay=0.1)
    decays = {(group["part"], group["weight_decay"]) for group in held}
    own = [("language_model", 0.3), ("connector", 0.1)]
    assert decays == {(part, d) for part, decay in own for d in (0.0, decay)}


def test_layers_outside_the_range_are_frozen(make_model):
    model, _ = make_model()
    freeze(model, {"language_model": PartRates(learning_rate=1e-3, layers=[1, 2])})
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith("model.language_model.layers.1.") for n in trained)
    freeze(model, {"language_model": PartRates(learning_rate=1e-3, layers="1-")})
    assert model.lm_head.weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad


def test_a_range_beyond_the_model_names_its_place(make_model):
    model, _ = make_model()
    rates = {"vision_tower": PartRates(learning_rate=1e-3, layers="7-")}
    with pytest.raises(UserError, match=r"trainable\.vision_tower: layers '7-'.* 2 layers"):
        freeze(model, rates)


def test_description_tells_of_layers(make_model):
    model, _ = make_model()
    rates = PartRates(learning_rate=1e-3, layers="1-", layer_decay=0.9)
    line = list(describe(model, {"language_model": rates}))[2]
    assert "trains at 0.001, layers 1-: 0.0" in line and "times 0.9" in line


def one_step(model, processor, make_image, groups):
    """Return AdamW after one step on a picture, and what the backward pass kept, by module."""
    running, kept = [""], {}

    def leave(*_):
        running.pop()

    def keep(tensor):
        kept.setdefault(running[-1], []).append(tensor.numel())
        return tensor

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(leave)

    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
    ]
    row = processor.encode(messages, [make_image()], supervise=True)
    optimizer = torch.optim.AdamW(optimizer_groups(model, groups, 0.1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(**processor.collate([row], padding_side="right")).loss
    loss.backward()
    optimizer.step()
    return optimizer, kept


@pytest.mark.parametrize(
    "trainable, keeps, keeps_not",
    [
        (
            {"connector": 1e-3},
            ["model.connector", "model.language_model.layers.0"],
            ["model.vision_tower"],
        ),
        (
            {"language_model": PartRates(learning_rate=1e-3, layers="1-")},
            ["model.language_model.layers.1"],
            ["model.vision_tower", "model.connector", "model.language_model.layers.0"],
        ),
        (
            {"vision_tower": PartRates(learning_rate=1e-3, layers=[1, 2])},
            ["model.vision_tower.model.encoder.layers.1", "model.connector"],
            ["model.vision_tower.model.encoder.layers.0"],
        ),
    ],
)
def test_what_is_frozen_keeps_nothing(make_model, make_image, trainable, keeps, keeps_not):
    model, processor = make_model()
    groups = freeze(model, trainable)
    optimizer, kept = one_step(model, processor, make_image, groups)
    trained = {id(p) for group in groups for p in map(model.get_parameter, group.names)}
    for parameter in model.parameters():
        has_state = parameter in optimizer.state
        assert (parameter.grad is not None) == has_state == (id(parameter) in trained)
    below = {part: [n for n in kept if f"{n}.".startswith(f"{part}.")] for part in keeps}
    assert all(below.values()), sorted(kept)
    for part in keeps_not:
        assert not [n for n in kept if f"{n}.".startswith(f"{part}.")], part
