"""Does an adapter stand beside the language model's linear layers alone, and merge into them?"""

import pytest
import torch

from vlm.adapters import (
    AdapterConfig,
    adapted_linears,
    add_adapter,
    check_beside,
    choose_linears,
    is_adapter,
    linear_names,
    merge_adapter,
)
from vlm.errors import UserError

NAMES = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"]
LORA = {"type": "partial_lora", "rank": 2, "alpha": 2.0}
TARGETS = {
    "all": ("all-linear", NAMES),
    "a last name": (["q_proj"], [NAMES[0], NAMES[2]]),
    "two": (["mlp.up_proj", "self_attn.q_proj"], NAMES),
}


@pytest.mark.parametrize(("targets", "expected"), TARGETS.values(), ids=TARGETS)
def test_targets(targets, expected) -> None:
    assert choose_linears(NAMES, targets) == expected


@pytest.mark.parametrize("targets", [["proj"], ["up_proj", "down_proj"], ["0.mlp.up"]])
def test_targets_are_whole_names(targets) -> None:
    with pytest.raises(UserError, match="its linear layers are q_proj, up_proj"):
        choose_linears(NAMES, targets)


def test_no_linear_layers() -> None:
    with pytest.raises(UserError, match="has no linear layers"):
        choose_linears([], "all-linear")


@pytest.mark.parametrize("connector", [{"type": "mlp"}, [{"type": "mlp"}, LORA]], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_it_merges_into_the_layers_it_stands_beside(make_model, make_image, connector, dora):
    if dora and isinstance(connector, list):
        with pytest.raises(UserError, match="which dora would rescale"):
            check_beside(connector, AdapterConfig(dora=True))
        return
    model, processor = make_model(connector=connector)
    before = dict(model.state_dict())
    wanted = {f"model.language_model.{n}" for n in linear_names(model.model.language_model)}
    add_adapter(model, AdapterConfig(rank=2, alpha=4, dora=dora))
    assert set(adapted_linears(model)) == wanted
    assert not any("connector" in name or "vision" in name for name in wanted)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        assert is_adapter(name) == ("lora_" in name)
        if is_adapter(name) or "up.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    text = f"{processor.image_token} What?"
    inputs = processor(text=text, images=[make_image()], return_tensors="pt")
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        merge_adapter(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(before)


def test_layers_that_others_stand_for() -> None:
    """The adapter's product would reach image tokens, and once merged it would not."""
    connector = [{"type": "mlp"}, {"type": "visual_expert"}]
    with pytest.raises(UserError, match="could not be merged; train without one"):
        check_beside(connector, AdapterConfig())
