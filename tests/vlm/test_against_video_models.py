"""Are logits and gradients those of transformers' video models, with their weights and frames?

LLaVA-OneVision pools tokens, after its projector, as we do. LLaVA-NeXT-Video, as transformers has
it, pools features before its projector (the first release's `vision_resampler`; later ones pool
tokens): here that is a connector, `pooling`, whose images are then pooled too.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm.encoders import build_vision_encoder
from vlm.loading import assemble
from vlm.video import video_of_frames

VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "patch_size": 8}
TEXT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
NORMAL = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}
CASES = {
    "llava_onevision": SimpleNamespace(
        model=LlavaOnevisionForConditionalGeneration,
        config=LlavaOnevisionConfig,
        processor=LlavaOnevisionVideoProcessor,
        vision=SiglipVisionConfig(**VISION, image_size=40),  # 5 x 5 patches: pooling rounds
        text=Qwen2Config(**TEXT),
        layer=-1,
        connector={"type": "mlp"},
        video={"newline": "one_token"},  # bilinear
        tokens=4 * 9 + 1,
    ),
    "llava_next_video": SimpleNamespace(
        model=LlavaNextVideoForConditionalGeneration,
        config=LlavaNextVideoConfig,
        processor=LlavaNextVideoVideoProcessor,
        vision=CLIPVisionConfig(**VISION, image_size=32),
        text=LlamaConfig(**TEXT),
        layer=-2,
        connector={"type": "pooling", "side": 2, "pool": "before"},
        video={"stride": 1},
        tokens=4 * 4,
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def ours_with_weights_of(theirs, case, tokenizer):
    """Return our model and processor with the weights of transformers' one."""
    architecture = {**case.vision.to_dict(), "model_type": case.vision.model_type}
    encoder = build_vision_encoder(
        {"type": "transformers", "layer": case.layer, "architecture": architecture, **NORMAL}
    )
    inner = theirs.model
    assert not encoder.model.load_state_dict(inner.vision_tower.state_dict(), False).missing_keys
    language_model = AutoModelForCausalLM.from_config(theirs.config.text_config)
    language_model.model.load_state_dict(inner.language_model.state_dict())
    language_model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    model, processor = assemble(
        encoder, case.connector, language_model, tokenizer=tokenizer, chat_template="chatml",
        video=case.video,
    )  # fmt: skip
    projector = [p for _, p in inner.multi_modal_projector.named_parameters()]
    with torch.no_grad():
        for own, published in zip(model.model.connector.parameters(), projector, strict=True):
            own.copy_(published)
        if model.model.video.has_newline:
            model.model.image_newline.copy_(inner.image_newline)
    return model.eval(), processor


def test_values_and_gradients_of_the_whole_model(case, make_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = case.config(
        vision_config=case.vision, text_config=case.text, vision_feature_layer=case.layer
    )
    theirs = case.model(config)
    theirs.model.image_newline.data.normal_()
    theirs.save_pretrained(tmp_path)
    theirs = case.model.from_pretrained(tmp_path).eval()
    model, processor = ours_with_weights_of(theirs, case, make_tokenizer())

    side = case.vision.image_size
    noise = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    video = video_of_frames([Image.fromarray(frame) for frame in noise])
    asked = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    encoded = processor.encode([{"role": "user", "content": asked}], videos=[video])
    batch = processor.collate([encoded], "right")
    assert int((encoded["input_ids"] == processor.image_token_id).sum()) == case.tokens

    size = {"height": side, "width": side}
    look = case.processor(
        size=size, crop_size=size, do_center_crop=False, do_sample_frames=False, **NORMAL
    )
    frames = look(videos=[torch.from_numpy(noise).permute(0, 3, 1, 2)], return_tensors="pt")
    seen = frames["pixel_values_videos"]
    torch.testing.assert_close(seen[0], batch["pixel_values"], rtol=0, atol=2e-6)

    theirs.config.video_token_id = theirs.model.config.video_token_id = processor.image_token_id
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = theirs(input_ids=ids, attention_mask=mask, pixel_values_videos=seen).logits
    found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    cotangent = torch.randn_like(expected)
    learnt = [*model.model.connector.parameters()]
    published = [*theirs.model.multi_modal_projector.parameters()]
    if model.model.video.has_newline:
        learnt.append(model.model.image_newline)
        published.append(theirs.model.image_newline)
    for own, their in zip(
        torch.autograd.grad(found, learnt, cotangent),
        torch.autograd.grad(expected, published, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(own, their, rtol=1e-4, atol=1e-4)
