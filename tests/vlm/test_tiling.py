"""Are images cut into the views that the published models were trained on?"""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.errors import UserError
from vlm.tiling import (
    NEXT_GRIDS,
    AnyresTiling,
    DynamicTiling,
    HdTiling,
    PadTiling,
    ResizeTiling,
    ViewPlan,
    build_tiling,
    tiling_config,
)

GREY = (122, 116, 104)
RANGE = "(1x1),...,(6x6)"
SIZES = [(336, 336), (640, 480), (600, 900), (1000, 32), (32, 200)]


def picture(width: int, height: int) -> Image.Image:
    """A picture whose every place looks different."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, (x * 3 + y * 5) % 256], -1).astype(np.uint8))


def test_resize_is_one_stretched_view() -> None:
    (view,) = ResizeTiling().split(picture(90, 30), 32, GREY)
    assert view.size == (32, 32)
    assert ResizeTiling().plan(90, 30, 32) == ViewPlan(1, 1)
    assert np.asarray(view)[16, 0, 0] < 10 and np.asarray(view)[16, -1, 0] > 245


@pytest.mark.parametrize("size, grey_place", [((90, 30), (2, 16)), ((30, 90), (16, 2))])
def test_pad_keeps_the_shape_and_fills_with_the_mean(size, grey_place) -> None:
    (view,) = PadTiling().split(picture(*size), 32, GREY)
    assert np.asarray(view)[grey_place].tolist() == list(GREY)
    assert np.asarray(view)[16, 16].tolist() != list(GREY)


def test_pad_of_an_extreme_strip_does_not_make_an_extreme_square() -> None:
    (view,) = PadTiling().split(Image.new("RGB", (60_000, 2), (255, 0, 0)), 32, GREY)
    assert view.size == (32, 32)


def test_anyres_order_is_whole_then_rows_of_tiles() -> None:
    image = picture(672, 336)
    whole, left, right = AnyresTiling().split(image, 336, GREY)
    assert AnyresTiling().plan(672, 336, 336) == ViewPlan(1, 2, "first")
    assert np.array_equal(left, image.crop((0, 0, 336, 336)))
    assert np.array_equal(right, image.crop((336, 0, 672, 336)))
    assert np.array_equal(whole, image.resize((336, 336), Image.Resampling.BICUBIC))


def test_anyres_pads_with_black_whatever_the_mean() -> None:
    views = AnyresTiling().split(Image.new("RGB", (600, 300), (255, 255, 255)), 336, GREY)
    tall = AnyresTiling(grids=((2, 2),)).split(Image.new("RGB", (600, 300), "white"), 336, GREY)
    assert len(views) == 3 and len(tall) == 5
    assert np.asarray(tall[1])[0, 0].tolist() == [0, 0, 0]


def test_anyres_ties_go_to_the_first_grid() -> None:
    # 336x336 fits every grid of the list: all keep it whole, the least waste is 1x2 = 2x1.
    assert AnyresTiling().plan(336, 336, 336).grid == (2, 1)
    assert AnyresTiling(grids=NEXT_GRIDS[::-1]).plan(336, 336, 336).grid == (1, 2)


def test_anyres_range_is_every_grid_width_outermost() -> None:
    grids = AnyresTiling(grids=RANGE).candidates()
    assert len(grids) == 36
    assert grids[:2] == ((1, 1), (2, 1)) and grids[6] == (1, 2)


def test_several_images_may_get_one_padded_view_each() -> None:
    tiling = AnyresTiling(multi_image="single_view")
    assert tiling.plan(900, 300, 336, num_images=1).num_views == 4
    assert tiling.plan(900, 300, 336, num_images=2) == ViewPlan(0, 0, "first")
    views = tiling.split(picture(900, 300), 336, GREY, num_images=2)
    assert len(views) == 1
    assert np.array_equal(views[0], PadTiling().split(picture(900, 300), 336, GREY)[0])


@pytest.mark.parametrize(
    "size, grids",
    [
        ((640, 480), [(2, 3), (3, 4), (3, 4)]),
        ((1920, 1080), [(1, 2), (2, 4), (3, 5)]),
        ((3840, 2160), [(1, 2), (2, 4), (3, 5)]),
        ((600, 1800), [(3, 1), (3, 1), (3, 1)]),
        ((1000, 32), [(1, 6), (1, 12), (1, 24)]),
        ((336, 336), [(1, 1), (1, 1), (1, 1)]),
        ((100, 100), [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_dynamic_grids(size, grids) -> None:
    for limit, grid in zip((6, 12, 24), grids, strict=True):
        assert DynamicTiling(max_tiles=limit).plan(*size, 448).grid == grid


def test_dynamic_compares_ratios_by_difference_so_transposes_differ() -> None:
    assert DynamicTiling(max_tiles=12).plan(100, 224, 448).grid == (5, 2)
    assert DynamicTiling(max_tiles=12).plan(224, 100, 448).grid == (1, 2)


def test_dynamic_tie_needs_half_the_pixels() -> None:
    # A square is 1x1, 2x2 or 3x3 exactly; more than half of 4 tiles of 448 begins at 634 pixels.
    assert DynamicTiling().plan(633, 633, 448).grid == (1, 1)
    assert DynamicTiling().plan(634, 634, 448).grid == (2, 2)


def test_dynamic_thumbnail_is_last_and_only_with_several_tiles() -> None:
    image = picture(640, 480)
    views = DynamicTiling(max_tiles=12).split(image, 448, GREY)
    assert len(views) == 13
    canvas = image.resize((4 * 448, 3 * 448), Image.Resampling.BICUBIC)
    assert np.array_equal(views[5], canvas.crop((448, 448, 896, 896)))
    assert np.array_equal(views[-1], image.resize((448, 448), Image.Resampling.BICUBIC))
    assert len(DynamicTiling().split(picture(50, 50), 448, GREY)) == 1
    assert len(DynamicTiling(thumbnail=False).split(image, 448, GREY)) == 12


def test_dynamic_images_share_the_tiles() -> None:
    tiling = DynamicTiling(max_tiles=12)
    assert tiling.plan(1000, 32, 448, num_images=4).grid == (1, 3)
    assert tiling.plan(1000, 32, 448, num_images=40).grid == (1, 1)
    assert DynamicTiling(share_tiles=False).plan(1000, 32, 448, num_images=4).grid == (1, 12)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((640, 480), (3, 3)),
        ((480, 640), (3, 3)),
        ((1920, 1080), (2, 3)),
        ((1000, 32), (1, 9)),
        ((100, 100), (3, 3)),
        ((1, 50_000), (9, 1)),
    ],
)
def test_hd_scales_up_to_its_tiles(size, grid) -> None:
    assert HdTiling(max_tiles=9).plan(*size, 336) == ViewPlan(*grid, "first")


def test_hd_upscale_bounds_the_growth() -> None:
    assert HdTiling(max_tiles=18, upscale=1.5).plan(100, 100, 560).grid == (1, 1)
    assert HdTiling(max_tiles=18, upscale=1.5).plan(374, 374, 560).grid == (2, 2)


@pytest.mark.parametrize("size", [(64, 48), (33, 80), (100, 7), (40, 40)])
def test_hd_pixels_are_the_published_ones(size) -> None:
    side, image = 28, picture(*size)
    whole, *tiles = HdTiling(max_tiles=9).split(image, side, GREY)
    # HD_transform and padding_336 of ixc_utils.py, with 28 in place of 336.
    turned = image.width < image.height
    canvas = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
    ratio, cols = canvas.width / canvas.height, 1
    while cols * np.ceil(cols / ratio) <= 9:
        cols += 1
    new_width = (cols - 1) * side
    new_height = int(new_width / ratio)
    scaled = canvas.resize((new_width, new_height), Image.Resampling.BILINEAR)
    rows = int(np.ceil(new_height / side))
    canvas = np.full((rows * side, new_width, 3), 255, np.uint8)
    top = int((rows * side - new_height) / 2)
    canvas[top : top + new_height] = np.asarray(scaled)
    canvas = canvas.transpose(1, 0, 2) if turned else canvas
    blocks = canvas.reshape(canvas.shape[0] // side, side, -1, side, 3).transpose(0, 2, 1, 3, 4)
    assert np.array_equal(np.stack(tiles), blocks.reshape(-1, side, side, 3))
    pixels = torch.tensor(canvas).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic")[0]
    found = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    # Of float pixels the reference makes no 8-bit ones again.
    assert (found - expected.clamp(0, 255)).abs().max() <= 0.501


@pytest.mark.parametrize("size", [(640, 480), (500, 333), (333, 801), (1000, 32), (70, 70)])
def test_anyres_pixels_equal_transformers(size) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    side = 84
    pinpoints = [[rows * side, cols * side] for rows, cols in NEXT_GRIDS]
    theirs = LlavaNextImageProcessorPil(
        image_grid_pinpoints=pinpoints,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_normalize=False,
        do_rescale=False,
    )
    image = picture(*size)
    expected = theirs(image, return_tensors="pt").pixel_values[0]
    views = AnyresTiling().split(image, side, GREY)
    ours = torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views])
    assert torch.equal(ours, expected.to(torch.uint8))


@pytest.mark.parametrize("size", [(640, 480), (500, 333), (333, 801), (1000, 32), (70, 70)])
def test_dynamic_pixels_equal_transformers(size) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,  # the processor of InternVL
    )

    side = 56
    theirs = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        crop_to_patches=True,
        max_patches=12,
        do_normalize=False,
        do_rescale=False,
    )
    image = picture(*size)
    expected = theirs(image, return_tensors="pt").pixel_values
    views = DynamicTiling(max_tiles=12).split(image, side, GREY)
    ours = torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views])
    assert torch.equal(ours, expected.to(torch.uint8))


def test_grids_equal_transformers_on_random_sizes() -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(0)
    tilings = [AnyresTiling(), AnyresTiling(grids=RANGE)]
    for width, height in rng.integers(1, 3000, (500, 2)).tolist():
        for tiling in tilings:
            pinpoints = [(r * 384, c * 384) for r, c in tiling.candidates()]
            rows, cols = select_best_resolution((height, width), pinpoints)
            assert tiling.plan(width, height, 384).grid == (rows // 384, cols // 384)
        cols, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert DynamicTiling(max_tiles=12).plan(width, height, 448).grid == (rows, cols)


@pytest.mark.parametrize("name", ["resize", "pad", "anyres", "dynamic", "hd"])
def test_a_plan_has_as_many_views_as_a_split_and_comes_back_from_its_grid(name) -> None:
    tiling = build_tiling({"type": name})
    for size in SIZES:
        plan = tiling.plan(*size, 24)
        assert plan.num_views == len(tiling.split(picture(*size), 24, GREY))
        assert tiling.plan_of_grid(plan.grid) == plan
    assert build_tiling(tiling_config(tiling)) == tiling


def test_configs_survive_json() -> None:
    config = {"type": "anyres", "grids": [[1, 1], [2, 3]], "max_tiles": 4}
    tiling = build_tiling(config)
    assert tiling == AnyresTiling(grids=((1, 1), (2, 3)), max_tiles=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiling.max_tiles = 5


@pytest.mark.parametrize(
    "config, words",
    [
        ({"type": "anyrez"}, "anyres"),
        ({"type": "dynamic", "max_tile": 3}, "max_tiles"),
        ({"type": "dynamic", "max_tiles": "six"}, "max_tiles"),
        ({"type": "dynamic", "max_tiles": 0}, "max_tiles=0"),
        ({"type": "dynamic", "min_tiles": 7, "max_tiles": 6}, "min_tiles=7"),
        ({"type": "anyres", "grids": "1x1 to 6x6"}, "(1x1),...,(6x6)"),
        ({"type": "anyres", "grids": []}, "grids"),
        ({"type": "anyres", "grids": [[0, 1]]}, "grids"),
        ({"type": "anyres", "max_tiles": 0}, "max_tiles"),
        ({"type": "hd", "max_tiles": 0}, "max_tiles must be at least 1, not 0"),
        ({"type": "hd", "upscale": 0.0}, "upscale must be above 0, not 0.0"),
        ("anyres", "{type: resize}"),
    ],
)
def test_mistakes_are_named(config, words) -> None:
    with pytest.raises(UserError) as error:
        build_tiling(config)
    assert words in str(error.value)
