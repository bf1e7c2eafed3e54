"""Does a Q-Former with its first stage's heads save, load, and leave its encoder alone?"""

import pytest
import torch

from connectors import resolve_connector_config
from connectors.qformer_losses import Pairs
from vlm.errors import UserError
from vlm.image_text_model import ImageTextConfig, ImageTextModel
from vlm.loading import load_model, load_weights

QFORMER = {"type": "qformer", "num_queries": 4, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
QFORMER |= {"feed_forward_dim": 32, "max_num_positions": 20, "dropout": 0.5}


def make(encoder, **fields):
    config = {"connector_config": resolve_connector_config(QFORMER), "vocab_size": 30}
    config |= {"vision_config": dict(encoder.config), "shared_dim": 8, "bos_token_id": 4}
    return ImageTextModel.from_encoder(encoder, ImageTextConfig(**{**config, **fields}))


def inputs():
    torch.manual_seed(0)
    numbers = torch.arange(2)
    pairs = Pairs(numbers, numbers, torch.rand(2, 2).double(), numbers >= 0)
    ids = torch.tensor([[2, 9, 8, 3], [2, 7, 3, 0]])
    pixels = torch.randn(2, 3, 32, 32)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids != 0, "pairs": pairs}


def test_saved_and_loaded(make_vision_encoder, tmp_path):
    model = make(make_vision_encoder()).eval()
    model.save_pretrained(tmp_path)
    again = load_weights(ImageTextModel, tmp_path).eval()
    for before, after in zip(model(**inputs()), again(**inputs()), strict=True):
        assert torch.equal(before, after)
    words = again.connector.qformer.word_embeddings.weight
    assert again.connector.caption_head.decoder.weight is words


def test_weights_of_other_sizes_are_refused(make_vision_encoder, tmp_path):
    make(make_vision_encoder()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"shared_dim": 8', '"shared_dim": 9'))
    with pytest.raises(UserError, match="another shape"):
        load_weights(ImageTextModel, tmp_path)


def test_it_is_no_model_to_chat_with(make_vision_encoder, tmp_path):
    make(make_vision_encoder()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'vlm_image_text' model, not a vision-language model"):
        load_model(tmp_path)


def test_encoder_never_trains(make_vision_encoder):
    model = make(make_vision_encoder()).train()
    assert not model.vision_tower.training
    assert model.connector.training
    found = model(**inputs())
    (found.contrastive + found.matching + found.caption).sum().backward()
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in model.connector.parameters())


def test_half_precision_leaves_the_qformer_in_float32(make_vision_encoder, tmp_path):
    make(make_vision_encoder()).save_pretrained(tmp_path)
    model = load_weights(ImageTextModel, tmp_path, "bfloat16").eval()
    assert {p.dtype for p in model.vision_tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert all(torch.isfinite(part).all() for part in model(**inputs()))


def test_one_of_several_feature_maps(make_vision_encoder):
    encoder = make_vision_encoder()
    model = make(encoder, features=[0]).eval()
    assert model.encode_pictures(inputs()["pixel_values"]).shape == (2, 16, 24)
    with pytest.raises(UserError, match=r"features \[1\] counts from 0, but .* gives 1 feature"):
        make(encoder, features=[1])
