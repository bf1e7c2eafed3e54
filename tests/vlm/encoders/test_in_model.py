"""Does every vision encoder survive inside a model that is saved and loaded?"""

import pytest
import torch

from vlm.loading import assemble
from vlm.modeling import VlmForConditionalGeneration

NAMES = ["clip", "dinov2_registers", "timm_eva_registers", "timm_swin", "open_clip_vit"]


@pytest.mark.parametrize("layer", ["last", -2])
@pytest.mark.parametrize("name", NAMES)
def test_features_after_save_and_load(
    name, layer, build, pictures, make_language_model, make_tokenizer, tmp_path
):
    encoder = build(name, layer=layer)
    images = pictures(encoder)
    wanted = encoder(images)[0].clone()
    model, _ = assemble(
        encoder,
        {"type": "linear"},
        make_language_model(),
        tiling=None,
        tokenizer=make_tokenizer(),
        chat_template="chatml",
    )
    assert torch.equal(model.eval().model.vision_tower(images)[0], wanted)
    model.save_pretrained(tmp_path)
    # Fresh memory is often zero or a copy of the right numbers: fill some with others first.
    junk = [torch.full((size,), 7.0) for size in (64, 256, 1024, 4096) for _ in range(50)]
    del junk
    loaded = VlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.model.vision_tower(images)[0], wanted)
