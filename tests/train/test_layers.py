"""Is every parameter found at its depth, whatever the model calls its layers?"""

import pytest
from torch import nn

from train.layers import depths
from vlm.errors import UserError


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_language_models(make_language_model, kind):
    found = depths(make_language_model(kind, num_hidden_layers=3).base_model)
    assert {layers for _, layers in found.values()} == {3}
    by_depth = [{name for name, (depth, _) in found.items() if depth == d} for d in range(5)]
    embeddings = {"llama": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in"}[kind]
    assert any(name.startswith(embeddings) for name in by_depth[0])
    stack = "h" if kind == "gpt2" else "layers"
    for number in range(3):
        assert by_depth[1 + number]
        assert all(name.startswith(f"{stack}.{number}.") for name in by_depth[1 + number])
    assert all("norm" in name or name.startswith("ln_f") for name in by_depth[4])


def test_encoder(make_vision_encoder):
    found = depths(make_vision_encoder())
    below = {name for name, place in found.items() if place == (0, 2)}
    assert any("position_embedding" in name for name in below)
    assert any("patch_embedding" in name for name in below)
    assert {depth for name, (depth, _) in found.items() if ".layers.1." in name} == {2}


def test_encoders_side_by_side_count_apart(make_two_encoders):
    encoder = make_two_encoders()
    found = depths(encoder)
    assert found.keys() == {name for name, _ in encoder.named_parameters()}
    for number in (0, 1):
        places = {p for name, p in found.items() if name.startswith(f"encoders.{number}.")}
        assert {(0, 2), (1, 2), (2, 2)} <= places


class Net(nn.Module):
    """Stem and head around whatever stacks it is given."""

    def __init__(self, **stacks):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        for name, stack in stacks.items():
            setattr(self, name, stack)
        self.head = nn.Linear(4, 4)


def block():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def test_the_outermost_stack_counts():
    found = depths(Net(stages=nn.Sequential(*(nn.ModuleList([block()] * 2) for _ in range(3)))))
    assert found["stem.0.weight"] == (0, 3)
    assert found["stages.2.0.0.weight"] == (3, 3)
    assert found["head.weight"] == (4, 3)


def test_layers_in_several_stacks_or_none_are_refused():
    with pytest.raises(UserError, match="Net has no stack of layers"):
        depths(Net(body=nn.Linear(4, 4)))
    with pytest.raises(UserError, match="Net has several stacks of layers"):
        depths(Net(layer1=nn.ModuleList([block()]), layer2=nn.ModuleList([block(), block()])))
