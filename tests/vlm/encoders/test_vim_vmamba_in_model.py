"""Do Vim and VMamba keep their weights inside a model, new ones and loaded ones?"""

import pytest
import torch
from transformers import LlamaConfig

from vlm.configuration import VlmConfig
from vlm.encoders import build_vision_encoder
from vlm.loading import assemble
from vlm.modeling import VlmForConditionalGeneration

CONFIGS = {
    "vim": {
        "type": "vim",
        "image_size": 32,
        "architecture": {"embed_dim": 16, "depth": 2, "patch_size": 8, "layer_scale": 0.1},
    },
    "vim_mamba2": {
        "type": "vim",
        "image_size": 32,
        "architecture": {
            "embed_dim": 16,
            "depth": 2,
            "patch_size": 8,
            "mixer": "mamba2",
            "head_dim": 8,
        },
    },
    "vmamba": {
        "type": "vmamba",
        "image_size": 64,
        "architecture": {"depths": [1, 1, 1], "dims": [8, 16, 24], "conv_bias": True},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_new_weights_of_a_model_are_the_encoders_own(name):
    encoder_config = build_vision_encoder(CONFIGS[name]).config
    config = VlmConfig(
        vision_config=encoder_config,
        connector_config={"type": "linear"},
        text_config=LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
        ),
        tiling={"type": "resize"},
        image_token_id=31,
    )
    torch.manual_seed(5)
    wanted = build_vision_encoder(encoder_config).state_dict()
    torch.manual_seed(5)
    found = VlmForConditionalGeneration(config).model.vision_tower.state_dict()
    assert set(found) == set(wanted)
    assert [k for k in wanted if not torch.equal(found[k], wanted[k])] == []


@pytest.mark.parametrize("layer", ["last", -2])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(
    name, layer, pictures, randomise, make_language_model, make_tokenizer, tmp_path
):
    encoder = randomise(build_vision_encoder({**CONFIGS[name], "layer": layer}).eval())
    images = pictures(encoder)
    wanted = encoder(images)[0].clone()
    model, _ = assemble(
        encoder,
        {"type": "linear"},
        make_language_model(),
        tokenizer=make_tokenizer(),
        chat_template="chatml",
    )
    model.save_pretrained(tmp_path)
    junk = [torch.full((size,), 7.0) for size in (64, 256, 1024, 4096) for _ in range(50)]
    del junk  # so that memory that nobody fills holds sevens
    loaded = VlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.model.vision_tower(images)[0], wanted)
