"""Does the model learn the same from an encoder's features as from the pictures themselves?"""

import pytest
import torch

ANYRES = {"type": "anyres"}
CONNECTORS = [
    {"type": "mlp"},
    [{"type": "mlp"}, {"type": "deepstack", "first_layer": 1}],
]


def freeze_tower(model):
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def with_features(model, batch):
    """Return the batch with its features in place of its views."""
    batch = dict(batch)
    with torch.no_grad():
        features = list(model.model.vision_tower(batch.pop("pixel_values")))
    return {**batch, "vision_features": features}


def no_views(model):
    (grid,), (dim,) = model.model.vision_tower.grids, model.model.vision_tower.dims
    return [torch.empty(0, *grid, dim)]


def loss_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch):
    expected, wanted = loss_and_gradients(model, batch)
    features = with_features(model, batch)
    model.model.vision_tower.forward = None  # whoever calls it now fails
    loss, gradients = loss_and_gradients(model, features)
    assert loss == expected
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("tiling", [None, ANYRES])
def test_features_give_the_loss_and_gradients_of_pictures(tiling, connector, make_model, rows):
    model, processor = make_model(tiling=tiling, connector=connector)
    assert_same(freeze_tower(model), processor.collate(rows(processor), "right"))


def test_gradient_checkpointing_with_features(make_model, rows):
    model, processor = make_model(tiling=ANYRES)
    freeze_tower(model).gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, processor.collate(rows(processor), "right"))


def test_lora_with_features(make_model, rows):
    peft = pytest.importorskip("peft")
    model, processor = make_model()
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj")
    adapted = peft.get_peft_model(freeze_tower(model), config)
    batch = processor.collate(rows(processor), "right")
    expected, wanted = loss_and_gradients(adapted, batch)
    loss, gradients = loss_and_gradients(adapted, with_features(model, batch))
    assert loss == expected
    assert gradients and all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_text_only_batches_do_not_run_the_tower(make_model, rows):
    model, processor = make_model()
    freeze_tower(model).model.vision_tower.forward = None
    batch = processor.collate(rows(processor)[1:2], "right")
    _, gradients = loss_and_gradients(model, {**batch, "vision_features": no_views(model)})
    of_connector = [g for name, g in gradients.items() if "connector" in name]
    assert len(of_connector) == len(list(model.model.connector.parameters()))
    assert not any(gradient.any() for gradient in of_connector)


def test_pictures_and_features_together_are_refused(make_model, rows):
    model, processor = make_model()
    batch = processor.collate(rows(processor), "right")
    with pytest.raises(ValueError, match="not both"):
        model(**batch, vision_features=no_views(model))
