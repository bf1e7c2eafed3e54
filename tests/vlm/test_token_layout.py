"""Is the number of image tokens the published one, and is the layout transformers' own?"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlm.errors import UserError
from vlm.tiling import (
    NEXT_GRIDS,
    AnyresTiling,
    DynamicTiling,
    HdTiling,
    PadTiling,
    ResizeTiling,
)
from vlm.token_layout import (
    images_per_row,
    lay_out,
    num_image_tokens,
    shown_parts,
    unpadded_box,
)

RANGE = "(1x1),...,(6x6)"
CLIP, SIGLIP, INTERNVL = (336, (24, 24)), (384, (27, 27)), (448, (16, 16))
NEXT = AnyresTiling()
MAX_9 = AnyresTiling(grids=RANGE, max_tiles=9)
MAX_4 = AnyresTiling(grids=RANGE, max_tiles=4)

# (width, height): tokens of v1.6 CLIP-336, v1.6 SigLIP-384, OneVision anyres_max_9 SigLIP-384,
# anyres_max_9 CLIP-336, anyres_max_4 SigLIP-384, and of InternVL with 6, 12, 24 tiles. Made by
# running the reference repositories' own functions.
TABLE = {
    (336, 336): (1176, 1513, 1485, 1176, 1485, 256, 256, 256),
    (640, 480): (2340, 2929, 2929, 2340, 2929, 1792, 3328, 3328),
    (1920, 1080): (1948, 2379, 7269, 5760, 3649, 768, 2304, 4096),
    (600, 1800): (2376, 2997, 7074, 5784, 3673, 1024, 1024, 1024),
    (3840, 2160): (1948, 2379, 7317, 5760, 3609, 768, 2304, 4096),
    (1000, 32): (722, 975, 975, 722, 975, 1792, 3328, 6400),
    (100, 100): (1176, 1513, 1485, 1176, 1485, 256, 256, 256),
}
COLUMNS = [
    (NEXT, CLIP),
    (NEXT, SIGLIP),
    (MAX_9, SIGLIP),
    (MAX_9, CLIP),
    (MAX_4, SIGLIP),
    (DynamicTiling(max_tiles=6), INTERNVL),
    (DynamicTiling(max_tiles=12), INTERNVL),
    (DynamicTiling(max_tiles=24), INTERNVL),
]
# Of v1.6 CLIP-336: views, and newlines.
NEXT_VIEWS = {
    (336, 336): (3, 24),
    (640, 480): (5, 36),
    (1920, 1080): (5, 28),
    (600, 1800): (4, 72),
    (3840, 2160): (5, 28),
    (1000, 32): (4, 2),
    (100, 100): (3, 24),
}


# XComposer2-4KHD with 9, 16, 25 and 55 tiles, IXC-2.5 with 18; from the repository's own functions.
HD_TABLE = {
    (336, 336): (1489, 2509, 3817, 7297, 841),
    (640, 480): (1489, 1921, 3085, 7141, 2061),
    (1920, 1080): (1045, 2353, 3661, 8005, 6481),
    (600, 1800): (1357, 1957, 3709, 7213, 4521),
    (3840, 2160): (1045, 2353, 3661, 8005, 6481),
    (1000, 32): (1465, 2473, 3769, 4633, 1641),
    (100, 100): (1489, 2509, 3817, 7297, 841),
}


@pytest.mark.parametrize("size", HD_TABLE)
def test_token_counts_of_hd(size) -> None:
    counts = [num_image_tokens(size, HdTiling(max_tiles=n), 336, (12, 12)) for n in (9, 16, 25, 55)]
    ixc = HdTiling(max_tiles=18, upscale=1.5)
    assert (*counts, num_image_tokens(size, ixc, 560, (20, 20))) == HD_TABLE[size]


@pytest.mark.parametrize("size", TABLE)
def test_token_counts(size) -> None:
    counts = [num_image_tokens(size, tiling, *numbers) for tiling, numbers in COLUMNS]
    assert counts == list(TABLE[size])


@pytest.mark.parametrize("size", NEXT_VIEWS)
def test_views_and_newlines(size) -> None:
    plan = NEXT.plan(*size, 336)
    tokens = torch.zeros(plan.num_views, 576, 1)
    laid = lay_out(tokens, size, NEXT, *CLIP, newline=torch.ones(1))
    assert (plan.num_views, int(laid.sum())) == NEXT_VIEWS[size]


def test_first_newline_of_two_tiles_side_by_side() -> None:
    laid = lay_out(torch.zeros(3, 576, 1), (672, 336), NEXT, *CLIP, newline=torch.ones(1))
    ends = laid[:, 0].nonzero().flatten().tolist()
    assert ends[0] == 624 and set(np.diff(ends)) == {49} and len(ends) == 24


def test_rounding_is_that_of_transformers_not_truncation() -> None:
    # LLaVA-NeXT's int() gives 14 rows here.
    assert unpadded_box((176, 55), (1, 2), (24, 24), unpad=True)[2] == 16


def test_one_view_under_unpad_has_one_newline() -> None:
    tiling = AnyresTiling(multi_image="single_view")
    grid = tiling.plan(900, 300, 336, num_images=2).grid
    assert num_image_tokens((900, 300), tiling, *CLIP, grid=grid) == 577
    laid = lay_out(
        torch.zeros(1, 576, 1), (900, 300), tiling, *CLIP, newline=torch.ones(1), grid=grid
    )
    assert laid[:, 0].nonzero().tolist() == [[576]]


@pytest.mark.parametrize(
    "tiling",
    [
        ResizeTiling(),
        PadTiling(),
        PadTiling(unpad=True),
        DynamicTiling(max_tiles=6),
        DynamicTiling(max_tiles=6, thumbnail=False),
        NEXT,
        AnyresTiling(unpad=False),
        AnyresTiling(grids=RANGE),
        AnyresTiling(grids=RANGE, max_tiles=2),
        AnyresTiling(grids=RANGE, max_tiles=1, unpad=False),
        HdTiling(max_tiles=7),
        HdTiling(max_tiles=7, upscale=1.5),
    ],
)
@pytest.mark.parametrize("token_grid", [(3, 3), (4, 4), (2, 5)])
def test_lay_out_has_the_counted_length(tiling, token_grid) -> None:
    rng = np.random.default_rng(0)
    # Even logarithms: strips of 1 pixel come too.
    sizes = np.exp(rng.uniform(0, np.log(2000), (100, 2))).astype(int).tolist()
    for size in map(tuple, sizes):
        plan = tiling.plan(*size, 56)
        tokens = torch.zeros(plan.num_views, token_grid[0] * token_grid[1], 2)
        end = torch.ones(2)
        laid = lay_out(tokens, size, tiling, 56, token_grid, newline=end, separator=end)
        assert laid.shape == (num_image_tokens(size, tiling, 56, token_grid), 2), size


def test_views_follow_one_another_without_a_mosaic() -> None:
    tokens = torch.arange(7 * 4).float().view(7, 4, 1)
    laid = lay_out(tokens, (640, 480), DynamicTiling(max_tiles=6), 448, (2, 2))
    assert laid.flatten().tolist() == list(range(28))


@pytest.mark.parametrize("max_tiles", [None, 1, 2])
@pytest.mark.parametrize("size", [(640, 480), (1000, 32), (333, 801), (176, 55), (100, 100)])
def test_values_and_gradients_equal_transformers(size, max_tiles) -> None:
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    width, height = size
    pinpoints = [[rows * 336, cols * 336] for rows, cols in NEXT_GRIDS]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=42), image_grid_pinpoints=pinpoints
    )
    tiling = AnyresTiling(max_tiles=max_tiles)
    torch.manual_seed(0)
    tokens = torch.randn(tiling.plan(*size, 336).num_views, 64, 5)
    newline = torch.randn(5)
    weights, results = None, []
    for ours in (True, False):
        inputs = [tokens.clone().requires_grad_(), newline.clone().requires_grad_()]
        if ours:
            laid = lay_out(inputs[0], size, tiling, 336, (8, 8), newline=inputs[1])
        elif max_tiles is None:
            laid = LlavaNextModel.pack_image_features(
                SimpleNamespace(config=config),
                [inputs[0]],
                torch.tensor([[height, width]]),
                "full",
                inputs[1],
            )[0][0]
        else:
            laid = LlavaOnevisionModel.pack_image_features(
                SimpleNamespace(config=config),
                [inputs[0]],
                torch.tensor([[height, width]]),
                inputs[1],
                f"anyres_max_{max_tiles}",
            )[0][0]
        weights = torch.randn(laid.shape) if weights is None else weights
        (laid * weights).sum().backward()
        results.append((laid.detach(), inputs[0].grad, inputs[1].grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), 12 * 25), ((50, 100), 24 * 13), ((60, 60), 24 * 25), ((2000, 1), 2 * 25)],
)
def test_a_padded_view_is_cut_to_its_image_with_newlines(size, expected) -> None:
    assert num_image_tokens(size, PadTiling(unpad=True), *CLIP) == expected


def test_what_pads_a_view_leaves_the_sequence() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    laid = lay_out(tokens, (100, 50), PadTiling(unpad=True), 56, (4, 4), newline=-torch.ones(1))
    assert laid.flatten().tolist() == [4, 5, 6, 7, -1, 8, 9, 10, 11, -1]


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [
        (100, 50, (2, 6), (0, 8)),
        (50, 100, (0, 8), (2, 6)),
        (100, 90, (0, 8), (0, 8)),
        (1000, 1, (0, 0), (0, 8)),
    ],
)
def test_padding_is_found(width, height, rows, columns) -> None:
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[:, slice(*rows), slice(*columns)] = True
    assert torch.equal(shown_parts((width, height), PadTiling(), (1, 1), (8, 8)), expected)


def test_the_whole_of_hd_shows_its_padding() -> None:
    assert shown_parts((100, 60), HdTiling(), (2, 3), (4, 4)).all()
    # Of 2 x 3 tiles the image has two rows in the middle, the whole's cells are two rows high.
    whole, first, *_ = shown_parts((100, 10), HdTiling(), (2, 3), (4, 4))
    assert whole.tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    assert first.tolist() == [[False] * 4] * 3 + [[True] * 4]


def test_only_tiles_on_a_canvas_are_padded() -> None:
    assert shown_parts((90, 10), DynamicTiling(), (2, 3), (4, 4)).all()
    assert shown_parts((90, 10), DynamicTiling(), (2, 3), (4, 4)).shape == (7, 4, 4)
    whole, left, right = shown_parts((90, 30), NEXT, (1, 2), (6, 6))
    assert whole.all() and torch.equal(left, right) and left.any(-1).sum() == 4
    alone = shown_parts((90, 30), NEXT, (0, 0), (6, 6))
    assert alone.shape == (1, 6, 6) and alone[0].any(-1).sum() == 2


def test_images_are_given_to_rows_in_order() -> None:
    assert images_per_row([5, 0, 7], [2, 3, 7]) == [2, 0, 1]


@pytest.mark.parametrize(
    "rows, images, name",
    [
        ([5, 4], [5, 5], "record b"),  # truncated
        ([5, 5], [5], "record b"),  # an image is missing
        ([5, 0], [5, 5], "record b"),  # one too many
        ([4, 6], [5, 5], "record a"),  # the totals agree, the rows do not
    ],
)
def test_mismatches_name_both_numbers_and_the_record(rows, images, name) -> None:
    with pytest.raises(UserError) as error:
        images_per_row(rows, images, record_ids=["a", "b"])
    message = str(error.value)
    assert name in message
    assert f"{sum(rows)} image tokens" in message and f"{sum(images)} image features" in message
