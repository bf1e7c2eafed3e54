"""Do the connectors of several encoders, and of none, work inside a model: train, save, load?"""

import pytest
import torch

from vlm.encoders import VISION_ENCODERS, build_vision_encoder
from vlm.encoders.patches import PatchesEncoder
from vlm.loading import assemble
from vlm.modeling import VlmForConditionalGeneration

SVA = {"type": "sva", "windows": [1, 2], "hidden_dim": 16, "num_heads": 4, "depth": 1}
CASES = [
    (SVA, [4, 8], 16),
    ({**SVA, "query_strides": [1, 2]}, [4, 8], 16),
    ({"type": "minigemini"}, [4, 8], 16),
    ({"type": "minigemini", "tiles": 2}, [4, 16], 80),
    ({"type": "channel_concat", "side": 3}, [4, 8], 9),
    ({"type": "channel_concat", "projection": "fused_mlp"}, [2, 8], 4),
]


@pytest.fixture
def two_encoders(tiny):
    """Build a ViT and a ConvNeXt, their maps of the given sides."""

    def build(sides, tiles):
        parts = [{**tiny["timm_vit"], "layer": -2}, {**tiny["timm_convnext"], "layer": [-2, -1]}]
        torch.manual_seed(0)
        config = {"type": "several", "encoders": parts, "resize_to": sides}
        config["tiles"] = [tiles, 1]
        return build_vision_encoder(config)

    return build


def check(encoder, connector, num_tokens, make_language_model, make_tokenizer, folder):
    """Train one step, save, load: same tokens, every connector weight moved."""
    torch.manual_seed(0)
    model, processor = assemble(
        encoder,
        connector,
        make_language_model(),
        tokenizer=make_tokenizer(),
        chat_template="chatml",
    )
    assert processor.image_processor.num_tokens((640, 480)) == num_tokens
    views = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    tokens = model.model.get_view_tokens(views)
    assert tokens.shape[:2] == (2, num_tokens)
    tokens.pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.model.connector.parameters())
    model.eval().save_pretrained(folder)
    loaded = VlmForConditionalGeneration.from_pretrained(folder).eval()
    before, after = (m.model.get_view_tokens(views) for m in (model, loaded))
    assert torch.equal(before, after)


@pytest.mark.parametrize(("connector", "sides", "num_tokens"), CASES, ids=str)
def test_two_encoders(
    two_encoders, connector, sides, num_tokens, make_language_model, make_tokenizer, tmp_path
):
    encoder = two_encoders(sides, connector.get("tiles", 1))
    check(encoder, connector, num_tokens, make_language_model, make_tokenizer, tmp_path)


def test_no_encoder(monkeypatch, make_language_model, make_tokenizer, tmp_path):
    monkeypatch.setitem(VISION_ENCODERS, "patches", PatchesEncoder)
    encoder = build_vision_encoder({"type": "patches", "patch_size": 8, "image_size": 32})
    check(encoder, {"type": "fuyu"}, 16, make_language_model, make_tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["kan", "cabstractor", "pooling", "qwen2vl_merger"])
def test_one_encoder(name, tiny, make_language_model, make_tokenizer, tmp_path):
    torch.manual_seed(0)
    encoder = build_vision_encoder(tiny["timm_vit"])
    num_tokens = 16 if name == "kan" else 4
    check(encoder, {"type": name}, num_tokens, make_language_model, make_tokenizer, tmp_path)
