"""Do videos' tokens stand as LLaVA-NeXT-Video and LLaVA-OneVision have them, and train so?"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from connectors.sva_blocks import cut_windows
from vlm.errors import UserError
from vlm.loading import load_model
from vlm.tiling import build_tiling
from vlm.token_layout import lay_out, num_image_tokens, shown_parts
from vlm.video import video_of_frames
from vlm.video_layout import VideoConfig, lay_out_video, num_video_tokens, parse_video, pooled_grid
from vlm.video_times import ShownVideo

NEWLINES = ("grid", "frame", "one_token", "no_token")
POOLS = ("bilinear", "average", "max")


@pytest.mark.parametrize(
    ("side", "pool", "left", "counts"),
    [
        (24, "bilinear", 12, (1248, 1160, 1153, 1152)),  # CLIP-336, 8 frames
        (27, "bilinear", 14, (1680, 1576, 1569, 1568)),  # SigLIP-384
        (27, "average", 13, (1456, 1360, 1353, 1352)),
        (27, "max", 13, (1456, 1360, 1353, 1352)),
    ],
)
def test_token_counts(side, pool, left, counts):
    for newline, count in zip(NEWLINES, counts, strict=True):
        config = VideoConfig(pool=pool, newline=newline)
        assert pooled_grid((side, side), config) == (left, left)
        tiling = build_tiling({"type": "anyres"})
        assert (
            num_image_tokens((640, 360), tiling, 336, (side, side), (0, 8), config)
            == num_video_tokens(8, (side, side), config)
            == count
        )


def test_frames_that_fit_a_context():
    per_frame = num_video_tokens(1, (24, 24), VideoConfig())
    assert (per_frame, 4096 // per_frame, 8192 // per_frame) == (144, 28, 56)


def transcription(tokens, side, pool, stride, newline_kind, newline):
    """`get_2dPool`, then the branches of `prepare_inputs_labels_for_multimodal`, frame by frame."""
    rows = []
    for frame in tokens:
        picture = frame.reshape(side, side, -1).permute(2, 0, 1)[None]
        if pool == "bilinear":
            size = [math.ceil(side / stride), math.ceil(side / stride)]
            picture = F.interpolate(picture, size=size, mode="bilinear")
        else:
            windows = picture.unfold(2, stride, stride).unfold(3, stride, stride).flatten(-2)
            picture = windows.mean(-1) if pool == "average" else windows.amax(-1)
        picture = picture[0].permute(1, 2, 0)
        for row in picture:
            rows.extend(row)
            if newline_kind == "grid":
                rows.append(newline)
        if newline_kind == "frame":
            rows.append(newline)
    if newline_kind == "one_token":
        rows.append(newline)
    return torch.stack(rows)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("newline_kind", NEWLINES)
@pytest.mark.parametrize(("side", "stride"), [(5, 2), (4, 2), (7, 3), (3, 1)])
def test_values_and_gradients_are_the_formulas(pool, newline_kind, side, stride):
    torch.manual_seed(0)
    tokens = torch.randn(3, side * side, 6, requires_grad=True)
    newline = torch.randn(6, requires_grad=True)
    config = VideoConfig(pool=pool, stride=stride, newline=newline_kind)
    ours = lay_out_video(tokens, (side, side), config, newline)
    expected = transcription(tokens, side, pool, stride, newline_kind, newline)
    assert len(ours) == num_video_tokens(3, (side, side), config)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    cotangent = torch.randn_like(ours)
    inputs = [tokens, newline] if config.has_newline else [tokens]
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [4, 5, 27])
def test_as_transformers_llava_onevision(side):
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    tokens, newline = torch.randn(2, side * side, 6), torch.randn(6)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=1))
    )
    pooled = LlavaOnevisionModel.apply_pooling(model, tokens)
    expected = torch.cat([pooled.flatten(0, 1), newline[None]])  # as its get_video_features
    ours = lay_out_video(tokens, (side, side), VideoConfig(newline="one_token"), newline)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("side", [4, 27])
def test_as_transformers_llava_next_video(pool, side):
    from transformers.models.llava_next_video.modeling_llava_next_video import (
        LlavaNextVideoPooler,
    )

    vision = SimpleNamespace(image_size=side, patch_size=1, hidden_size=6)
    pooler = LlavaNextVideoPooler(
        SimpleNamespace(spatial_pool_mode=pool, spatial_pool_stride=2, vision_config=vision)
    )
    tokens = torch.randn(2, side * side, 6)
    ours = lay_out_video(tokens, (side, side), VideoConfig(pool=pool), None)
    assert torch.equal(ours, pooler(tokens).flatten(0, 1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frames": 0}, "frames"),
        ({"stride": 0}, "stride"),
        ({"fps": 0}, "fps must be above 0"),
        ({"pool": "mean"}, "one of 'bilinear', 'average', 'max'"),
        ({"newlines": "grid"}, "did you mean 'newline'"),
    ],
)
def test_configs_that_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        parse_video(values)


def test_pooling_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="leaves nothing of a view's 2 x 4 tokens"):
        pooled_grid((2, 4), VideoConfig(pool="average", stride=3))


def test_where_padded_frames_show_the_picture():
    shown = shown_parts((64, 32), build_tiling({"type": "pad"}), (0, 2), (4, 4))
    assert shown.shape == (2, 4, 4) and shown[:, 1:3].all() and shown.sum() == 16
    assert shown_parts((64, 32), build_tiling({"type": "anyres"}), (0, 2), (4, 4)).all()


@pytest.mark.parametrize("pool", POOLS)
def test_queries_are_no_picture_and_are_all_kept(pool):
    config = VideoConfig(pool=pool, newline="frame")
    assert pooled_grid((1, 64), config) == (1, 64)
    assert num_video_tokens(8, (1, 64), config) == 8 * 65
    tokens, newline = torch.randn(2, 3, 6), torch.randn(6)
    ours = lay_out_video(tokens, (1, 3), config, newline)
    assert torch.equal(ours, torch.cat([*tokens[0], newline, *tokens[1], newline]).view(8, 6))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("side", [4, 5])
def test_windows_are_those_of_the_pooled_map(pool, side):
    """What a pooled token sees (SVA): the map as small as the tokens' grid is."""
    fine, config = torch.randn(2, 2 * side, 2 * side, 3), VideoConfig(pool=pool)
    windows = cut_windows(fine, 2).reshape(2, side * side, 12)
    left, _ = pooled_grid((side, side), config)
    picture = fine.permute(0, 3, 1, 2)
    if pool == "bilinear":
        small = F.interpolate(picture, (2 * left, 2 * left), mode="bilinear")
    else:
        small = {"average": F.avg_pool2d, "max": F.max_pool2d}[pool](picture, 2)
        small = small[..., : 2 * left, : 2 * left]
    expected = cut_windows(small.permute(0, 2, 3, 1), 2).reshape(2 * left * left, 12)
    found = lay_out_video(windows, (side, side), config, None, window=2)
    assert torch.equal(found, expected)


def test_windows_of_a_mosaic_that_is_shrunk():
    tiling = build_tiling({"type": "anyres", "grids": "(1x1),...,(2x2)", "max_tiles": 2})
    fine = torch.randn(5, 8, 8, 3)
    known = {"image_size": (64, 64), "tiling": tiling, "view_size": 32, "view_token_grid": (4, 4)}
    windows, end = cut_windows(fine, 2).reshape(5, 16, 12), torch.zeros(12)
    found = lay_out(windows, **known, newline=end, window=2)[16:].unflatten(0, (5, 6))
    picture = fine[1:].unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    small = F.interpolate(picture.permute(2, 0, 1)[None], (10, 10), mode="bilinear")
    expected = cut_windows(small.permute(0, 2, 3, 1), 2).reshape(5, 5, 12)
    assert torch.equal(found[:, :5], expected) and not found[:, 5].any()


# The whole model. Views are 4 x 4 tokens, frames 2 x 2.


def clip(count, seed=0, size=(40, 30)):
    rng = np.random.default_rng(seed)
    return video_of_frames(
        [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(count)]
    )


def messages(*kinds):
    entries = [{"type": kind} for kind in kinds]
    return [
        {"role": "user", "content": [*entries, {"type": "text", "text": "what moves?"}]},
        {"role": "assistant", "content": "all of it"},
    ]


def with_video(made, **values):
    model, processor = made
    model.model.set_video(parse_video(values))
    processor.image_processor.set_video(values)
    return model, processor


@pytest.mark.parametrize("tiling", ["resize", "pad", "anyres", "dynamic", "hd"])
@pytest.mark.parametrize("newline", ["grid", "no_token"])
def test_a_video_and_images_take_one_path(tiling, newline, make_model, make_image):
    model, processor = with_video(make_model({"type": tiling}), newline=newline)
    video, images = clip(3), [make_image(48, 40), make_image(64, 30, seed=1)]
    talk = messages("image", "video", "image")
    encoded = processor.encode(talk, images, videos=[video], supervise=True)
    assert encoded["tile_grids"][1].tolist() == [0, 3]
    assert encoded["image_sizes"][1].tolist() == [30, 40]
    shown = [images[0].size, ShownVideo(3), images[1].size]
    assert processor.count_tokens(talk, shown)[0] == len(encoded["input_ids"])
    batch = processor.collate([encoded], "right")
    first, seen, _ = model.get_image_features(
        batch["pixel_values"], batch["tile_grids"], batch["image_sizes"]
    )
    views = processor.image_processor.frame_views(video)
    tokens = model.model.get_view_tokens(processor.image_processor.normalize(views))
    row_end = model.model._row_ends().newline
    alone = lay_out_video(tokens, (4, 4), model.model.video, row_end)
    torch.testing.assert_close(seen, alone, rtol=0, atol=1e-6)
    assert len(seen) == 3 * 2 * (3 if newline == "grid" else 2)
    alone = processor.image_processor(images)
    other = model.get_image_features(**{k: alone[k] for k in batch if k in alone})
    torch.testing.assert_close(first, other[0], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def made(make_model):
    return with_video(make_model(), newline="frame", pool="max")


def test_packed_rows_with_videos_have_the_padded_loss(made, make_image):
    model, processor = made
    model.train()
    rows = [
        processor.encode(messages("video"), videos=[clip(2)], supervise=True),
        processor.encode(messages("image"), [make_image()], supervise=True),
        processor.encode(
            messages("video", "image"), [make_image()], videos=[clip(5, 1)], supervise=True
        ),
    ]
    padded = model(**processor.collate(rows, "right"))
    padded.loss.backward()
    newline = model.model.image_newline
    assert newline.grad is not None and newline.grad.abs().sum() > 0
    packed = model(**processor.pack(rows))
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=1e-5)
    model.zero_grad()
    model(**processor.collate(rows[1:2], "right")).loss.backward()
    assert newline.grad is not None and not newline.grad.any()  # used on every rank
    model.eval()


@torch.no_grad()
def test_beams_and_cache(made, make_image):
    model, processor = made
    rows = [
        processor.encode(messages("image", "video")[:1], [make_image()], videos=[clip(3)]),
        processor.encode(messages("video")[:1], videos=[clip(1, 2)]),
    ]
    batch = processor.collate(rows, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    together = model.generate(**batch, **options)
    assert torch.equal(together, model.generate(**batch, **options, use_cache=False))
    alone = model.generate(**processor.collate(rows[1:], "left"), **options)
    assert torch.equal(alone[0, -4:], together[1, -4:])


def test_saved_with_the_model(made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    loaded, again = load_model(tmp_path, device="cpu")
    assert loaded.model.video == model.model.video == again.image_processor.video_config
    assert torch.equal(loaded.model.image_newline, model.model.image_newline)
    batch = processor.collate([processor.encode(messages("video"), videos=[clip(2)])], "right")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_newline_that_nobody_needs_is_gone(make_model):
    model, _ = make_model()
    names = set(model.state_dict())
    model.model.set_video(VideoConfig(newline="grid"))
    assert set(model.state_dict()) - names == {"model.image_newline"}
    before = model.model.image_newline
    model.model.set_video(VideoConfig(newline="frame"))
    assert model.model.image_newline is before
    model.model.set_video(VideoConfig())
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("template", ["chatml", "llama3", "vicuna_v1", "llava_plain"])
def test_templates_know_videos_too(template, make_model):
    """transformers' own `apply_chat_template` hands entries to the template as they are."""
    _, processor = make_model(chat_template=template)
    talk = messages("video")
    talk[1]["content"] = [{"type": "text", "text": "all of it"}]
    text = processor.apply_chat_template(talk, tokenize=False)
    assert text.count("<image>") == 1


def test_counts_must_agree(made, make_image):
    _, processor = made
    with pytest.raises(UserError, match="1 video placeholders but 0 videos"):
        processor.encode(messages("video"), [])
    with pytest.raises(UserError, match="0 image placeholders but 1 images"):
        processor.encode(messages("video"), [make_image()], videos=[clip(2)])
    with pytest.raises(UserError, match="45 of them for 1 videos"):
        processor.encode(messages("video"), videos=[clip(9)], max_length=20)
