"""Does each of several encoders see what it would see alone, and give one map of the asked grid?"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate

from connectors.config import config_from_mapping
from vlm.encoders import (
    VISION_ENCODERS,
    build_vision_encoder,
    load_vision_encoder,
    several,
)
from vlm.encoders.presets import HALF, OPENAI
from vlm.encoders.several import SeveralEncoder, SeveralEncoderConfig, fit_views, join_layers
from vlm.errors import UserError
from vlm.loading import assemble
from vlm.modeling import VlmForConditionalGeneration

STAGES = [-4, -3, -2, -1]
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(VISION_ENCODERS, "several", SeveralEncoder)


@pytest.fixture
def config(tiny):
    """A ViT, 4 x 4 at 32 pixels, and a ConvNeXt's four stages, 16 x 16 to 2 x 2 at 64 pixels."""
    vit = {**tiny["timm_vit"], "layer": -2, "image_mean": OPENAI[0], "image_std": OPENAI[1]}
    convnext = {**tiny["timm_convnext"], "layer": STAGES}
    return {"type": "several", "encoders": [vit, convnext], "resize_to": [2, 8]}


@pytest.fixture
def make(config, randomise):
    """Build the two encoders, every parameter random."""

    def build(**changes: Any) -> Any:
        torch.manual_seed(0)
        return randomise(build_vision_encoder({**config, **changes}).eval())

    return build


def normalised(colors, pixels):
    """Return colours (T, 3, S, S) from 0 to 1 in a mean and std."""
    mean, std = (torch.tensor(values)[:, None, None] for values in pixels)
    return (colors - mean) / std


def colors(size, views=2):
    return torch.rand(views, 3, size, size, generator=torch.Generator().manual_seed(1))


def views_for(encoder):
    return normalised(colors(encoder.image_size), (encoder.image_mean, encoder.image_std))


def drawing(width=300, height=220):
    """A picture with what pictures have: slow changes, texture, edges, thin lines and letters."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.sin(columns[..., None] / [40, 23, 57]) + np.cos(rows[..., None] / [31, 61, 17])
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    image = Image.fromarray((128 + 50 * waves + noise).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 30, 120, 150), fill=(250, 240, 20), outline=(0, 0, 0))
    draw.ellipse((150, 60, 280, 200), fill=(20, 30, 200))
    draw.text((60, 170), "Which of the two is nearer?", fill=(255, 255, 255))
    return image


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


# What each encoder sees


def test_each_gets_its_own_size_mean_and_std(make):
    encoder = make()
    assert encoder.image_size == 64  # the largest
    assert (encoder.image_mean, encoder.image_std) == OPENAI  # the first one's
    seen = {}
    for i, part in enumerate(encoder.encoders):
        part.register_forward_pre_hook(lambda _, inputs, i=i: seen.update({i: inputs[0]}))
    encoder(views_for(encoder))
    second = encoder.encoders[1]
    pixels = (second.image_mean, second.image_std)
    torch.testing.assert_close(seen[1], normalised(colors(64), pixels), rtol=0, atol=2e-6)
    small = interpolate(colors(64), (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(seen[0], normalised(small, OPENAI), rtol=0, atol=2e-6)


def test_views_that_fit_are_passed_on_as_they_are():
    views = torch.randn(1, 3, 8, 8)
    assert fit_views(views, 8, OPENAI, OPENAI, "antialias") is views


@pytest.mark.parametrize("size", [224, 100, 37])
def test_resized_once_is_what_pil_does(size):
    # But PIL rounds to whole colours, and cuts what overshoots, after each of its two passes.
    image = Image.blend(drawing(256, 256), Image.new("RGB", (256, 256), (128,) * 3), 0.5)
    ours = fit_views(normalised(tensor(image), HALF), size, HALF, OPENAI, "antialias")
    theirs = normalised(tensor(image.resize((size, size), BICUBIC)), OPENAI)
    step = (ours - theirs) * torch.tensor(OPENAI[1])[:, None, None] * 255
    assert step.abs().max() < 1.6 and step.square().mean().sqrt() < 0.45


@pytest.mark.parametrize(("large", "small"), [(1024, 384), (1024, 336), (768, 336)])
def test_resized_twice_is_near_to_once(large, small):
    # Measured on eleven photographs of matplotlib and scikit-image, in steps of 1/255: on average
    # 0.5, at worst 1.2 for a picture, square mean 0.7; whole steps alone make a square mean of 0.3.
    image = drawing()
    large_view = normalised(tensor(image.resize((large, large), BICUBIC)), HALF)
    ours = fit_views(large_view, small, HALF, OPENAI, "antialias")
    theirs = normalised(tensor(image.resize((small, small), BICUBIC)), OPENAI)
    step = (ours - theirs) * torch.tensor(OPENAI[1])[:, None, None] * 255
    assert step.abs().mean() < 1.2
    # Shifted by half a pixel it would be far off.
    shifted = (ours.roll(1, -1) - theirs) * torch.tensor(OPENAI[1])[:, None, None] * 255
    assert shifted.abs().mean() > 5


def test_bilinear_is_mini_geminis():
    # Its scripts shrink the tensor for the ConvNeXt to CLIP's size by exactly this call.
    views = torch.randn(2, 3, 96, 96)
    wanted = interpolate(views, size=[42, 42], mode="bilinear", align_corners=False)
    assert torch.equal(fit_views(views, 42, OPENAI, OPENAI, "bilinear"), wanted)
    other = fit_views(views, 42, HALF, OPENAI, "bilinear")
    back = torch.tensor(HALF[1])[:, None, None] * wanted + torch.tensor(HALF[0])[:, None, None]
    torch.testing.assert_close(other, normalised(back, OPENAI), rtol=1e-5, atol=1e-5)


def test_no_colour_beyond_black_and_white():
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 30:] = 1
    small = fit_views(normalised(edge, HALF), 24, HALF, HALF, "antialias")
    assert small.min() == -1 and small.max() == 1
    unclamped = interpolate(edge, (24, 24), mode="bicubic", antialias=True)
    assert unclamped.min() < -0.01 and unclamped.max() > 1.01


def test_half_precision_views_are_resized_in_float32():
    views = torch.randn(1, 3, 64, 64).bfloat16()
    once = fit_views(views, 24, HALF, OPENAI, "antialias")
    assert once.dtype == torch.float32
    assert torch.equal(once, fit_views(views.float(), 24, HALF, OPENAI, "antialias"))


# What comes out


def test_one_map_each_of_the_asked_grid(make):
    encoder = make()
    maps = encoder(views_for(encoder))
    assert encoder.grids == ((2, 2), (8, 8)) and encoder.dims == (16, 8 + 12 + 16 + 20)
    assert [tuple(m.shape) for m in maps] == [(2, 2, 2, 16), (2, 8, 8, 56)]


@pytest.mark.parametrize("sides", [None, [None, None]])
def test_without_sides_the_finest_layer_decides(make, sides):
    encoder = make(resize_to=sides)
    assert encoder.grids == ((4, 4), (16, 16))
    assert [tuple(m.shape[1:3]) for m in encoder(views_for(encoder))] == [(4, 4), (16, 16)]


def test_maps_are_those_of_the_encoders_alone(make):
    encoder = make(resize_to=[None, None])
    first, second = encoder.encoders
    size, pixels = second.image_size, (second.image_mean, second.image_std)
    stages = second(normalised(colors(size), pixels))
    maps = encoder(views_for(encoder))
    torch.testing.assert_close(maps[1][..., :8], stages[0], rtol=1e-4, atol=2e-5)
    for k in (1, 2, 3):
        start = sum(second.dims[:k])
        wanted = interpolate(stages[k].permute(0, 3, 1, 2), (16, 16), mode="bilinear")
        ours = maps[1][..., start : start + second.dims[k]].permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    small = fit_views(views_for(encoder), 32, OPENAI, OPENAI, "antialias")
    assert torch.equal(maps[0], first(small)[0])


def test_features_are_resized_between_pixel_centres():
    row = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    assert join_layers([row], 4)[0, 0, :, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    wide = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 4, 4, 1)
    # From 37 to 24 and the like no average is taken: two neighbours count.
    assert join_layers([wide], 1).item() == 1.5
    assert join_layers([torch.eye(3)[None, ..., None]], 1).item() == 1.0


def test_layers_are_joined_in_their_order_at_the_finest():
    coarse, fine = torch.full((1, 2, 2, 3), 2.0), torch.full((1, 4, 4, 1), 4.0)
    assert join_layers([coarse, fine], None)[0, 0, 0].tolist() == [2, 2, 2, 4]
    assert join_layers([coarse, fine], None).shape == (1, 4, 4, 4)


def test_features_of_half_precision_are_resized_in_float32(monkeypatch):
    # Not to be seen in the result: the CPU's own function converts as well.
    types = []

    def spy(features, *args, **kwargs):
        types.append(features.dtype)
        return interpolate(features, *args, **kwargs)

    monkeypatch.setattr(several, "interpolate", spy)
    features = torch.randn(1, 7, 7, 5).bfloat16()
    joined = join_layers([features], 4)
    assert joined.dtype == torch.bfloat16 and types == [torch.float32]
    assert torch.equal(joined, join_layers([features.float()], 4).bfloat16())


def test_whole_tower_in_half_precision(make):
    encoder = make().bfloat16()
    assert [m.dtype for m in encoder(views_for(encoder))] == [torch.bfloat16] * 2


def test_gradient_reaches_every_parameter_and_pixel(make):
    encoder = make().train()
    views = views_for(encoder).requires_grad_()
    torch.stack([m.pow(3).sum() for m in encoder(views)]).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (views.grad != 0).float().mean() > 0.99


# Training, saving, loading


def test_frozen_encoder_stays_in_eval_mode_beside_a_trained_one(make):
    encoder = make()
    encoder.encoders[0].requires_grad_(False)
    encoder.train()
    assert [part.training for part in encoder.encoders] == [False, True]
    views = views_for(encoder)
    assert [m.requires_grad for m in encoder(views)] == [False, True]
    assert not any(part.training for part in encoder.eval().encoders)


def test_resolved_config_rebuilds_the_encoders(make):
    encoder = make()
    config = json.loads(json.dumps(encoder.config))
    assert [part["architecture"] for part in config["encoders"]] == [
        "vit_tiny_patch16_224",
        "convnext_atto",
    ]
    again = build_vision_encoder(config).eval()
    assert again.config == encoder.config
    again.load_state_dict(encoder.state_dict())
    for one, two in zip(encoder(views_for(encoder)), again(views_for(encoder)), strict=True):
        assert torch.equal(one, two)


def test_sizes_on_the_meta_device(make, config):
    encoder = make()
    with torch.device("meta"):
        empty = build_vision_encoder(config)
    assert all(p.is_meta for p in empty.parameters())
    assert (empty.config, empty.grids, empty.dims) == (encoder.config, encoder.grids, encoder.dims)


def test_saved_folder_loads_all_of_them(make, tmp_path):
    encoder = make(image_mean=[0.1, 0.2, 0.3])
    encoder.save_pretrained(tmp_path)
    again = load_vision_encoder({"type": "several", "source": str(tmp_path)}).eval()
    assert again.config == {**encoder.config, "source": str(tmp_path)}
    for one, two in zip(encoder(views_for(encoder)), again(views_for(encoder)), strict=True):
        assert torch.equal(one, two)


def test_saved_folder_with_other_grids(make, tmp_path):
    make().save_pretrained(tmp_path)
    values = {"type": "several", "source": str(tmp_path)}
    assert load_vision_encoder({**values, "resize_to": [4, 4]}).grids == ((4, 4), (4, 4))
    with pytest.raises(UserError, match="resize_to has 1 sides for 2 encoders"):
        load_vision_encoder({**values, "resize_to": [4]})


def test_each_from_its_own_source_in_one_type(make, config, tmp_path):
    encoder = make()
    for i, part in enumerate(encoder.encoders):
        part.save_pretrained(tmp_path / str(i))
    parts = [{"type": "timm", "source": str(tmp_path / str(i))} for i in range(2)]
    parsed = config_from_mapping(
        SeveralEncoderConfig, {"encoders": parts, "resize_to": [2, 8]}, "test"
    )
    again = SeveralEncoder.load(parsed, torch.bfloat16).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    again = again.float()
    state = encoder.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name].bfloat16().float())
    assert [part["source"] for part in again.config["encoders"]] == [
        part["source"] for part in parts
    ]


def test_loaded_without_a_source_beside_the_encoders(make, tmp_path):
    make().encoders[0].save_pretrained(tmp_path)
    part = {"type": "timm", "source": str(tmp_path)}
    assert load_vision_encoder({"type": "several", "encoders": [part]}).dims == (16,)
    with pytest.raises(UserError, match="'timm' needs a 'source' to load from"):
        load_vision_encoder({"type": "several", "encoders": [{**part, "source": None}]})


def test_parts_may_be_presets():
    parts = [{"preset": "mambaout-tiny"}, {"preset": "mambaout-small", "layer": -2}]
    with torch.device("meta"):
        encoder = build_vision_encoder({"type": "several", "encoders": parts})
    assert encoder.grids == ((7, 7), (14, 14)) and encoder.dims == (576, 384)
    assert [part["type"] for part in encoder.config["encoders"]] == ["timm", "timm"]


def test_inside_a_model(make, make_language_model, make_tokenizer, tmp_path):
    encoder = make(resize_to=[4, 4])
    wanted = [m.clone() for m in encoder(views_for(encoder))]
    model, processor = assemble(
        encoder,
        {"type": "mlp"},
        make_language_model(),
        tokenizer=make_tokenizer(),
        chat_template="chatml",
    )
    assert processor.image_processor.view_size == 64
    assert processor.image_processor.num_tokens((640, 480)) == 16
    model.save_pretrained(tmp_path)
    loaded = VlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    maps = loaded.model.vision_tower(views_for(encoder))
    for one, two in zip(maps, wanted, strict=True):
        assert torch.equal(one, two)
    tokens = loaded.model.get_view_tokens(views_for(encoder))  # the connector joins both maps
    assert tokens.shape[:2] == (2, 16)


BAD = [
    ({"encoders": []}, "needs 'encoders', such as"),
    ({"resize_to": [24]}, "resize_to has 1 sides for 2 encoders"),
    ({"resize_to": [24, 0]}, "resize_to must be positive, not"),
    ({"layer": -2}, "set layer in each of 'encoders'"),
    ({"downscale": "nearest"}, "field 'downscale' must be one of 'antialias', 'bilinear'"),
    ({"encoders": ["clip-l-336"]}, r"field 'encoders'\[0\] must be a mapping, not"),
    ({"encoders": [{"type": "tim"}]}, "did you mean 'timm'"),
    ({"encoders": [{"preset": "clip-l-33"}]}, "did you mean 'clip-l-336'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_mistakes_are_named(config, changes, message):
    if "encoders" in changes:
        config = {**config, "resize_to": None}
    with pytest.raises(UserError, match=message):
        build_vision_encoder({**config, **changes})


def test_source_that_is_not_its_folder(config, tmp_path):
    with pytest.raises(UserError, match="is no folder saved by it; set a source in each"):
        load_vision_encoder({**config, "source": str(tmp_path)})
