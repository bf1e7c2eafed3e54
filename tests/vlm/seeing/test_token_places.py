"""Does each token's box hold what the token saw, for every tiling, and do maps sum right?"""

import numpy as np
import pytest
import torch
from PIL import Image

from connectors.base import TokenCells
from vlm.image_processing import VlmImageProcessor
from vlm.seeing.heat_map import heat_map, map_size
from vlm.seeing.token_places import canvas_box, token_places
from vlm.tiling import build_tiling, plan_of
from vlm.token_layout import lay_out, num_image_tokens
from vlm.video import SampledVideo
from vlm.video_layout import VideoConfig

SIDE, GRID = 32, (4, 4)
TILINGS = [
    {"type": "resize"},
    {"type": "pad"},
    {"type": "pad", "unpad": True},
    {"type": "anyres"},
    {"type": "anyres", "unpad": False},
    {"type": "anyres", "grids": "(1x1),...,(6x6)", "max_tiles": 4},
    {"type": "anyres", "multi_image": "single_view"},
    {"type": "dynamic", "max_tiles": 6},
    {"type": "dynamic", "max_tiles": 6, "thumbnail": False},
    {"type": "hd", "max_tiles": 9},
]
SIZES = [(96, 64), (64, 160), (100, 100), (130, 40)]
PLAIN = TokenCells(*GRID, tuple(range(16)))


def places_of(config, image_size, cells=PLAIN, token_grid=GRID):
    tiling = build_tiling(config)
    num_images = 2 if "multi_image" in config else 1
    plan = tiling.plan(*image_size, SIDE, num_images)
    return tiling, plan, token_places(image_size, tiling, SIDE, token_grid, cells, plan)


def seen_tokens(tiling, plan, image, num_images):
    """Return (K,) the brightness that each token saw, row ends 0, from the views themselves."""
    views = tiling.split(image, SIDE, (0, 0, 0), num_images)
    light = [np.asarray(v.convert("L").resize(GRID[::-1], Image.Resampling.BOX)) for v in views]
    tokens = torch.from_numpy(np.stack(light)).double().reshape(len(views), -1, 1)
    end = torch.zeros(1, dtype=tokens.dtype)
    sizes = (image.size, tiling, SIDE, GRID)
    return lay_out(tokens, *sizes, newline=end, grid=plan.grid, separator=end)[:, 0]


@pytest.mark.parametrize("image_size", SIZES, ids=str)
@pytest.mark.parametrize("config", TILINGS, ids=str)
def test_the_tokens_that_saw_a_light_are_those_whose_boxes_hold_it(config, image_size):
    tiling, plan, places = places_of(config, image_size)
    width, height = image_size
    num_images = 2 if "multi_image" in config else 1
    for across, down in ((0.13, 0.2), (0.61, 0.4), (0.9, 0.85)):
        x, y = across * width, down * height
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        columns = slice(max(0, round(x) - 4), round(x) + 4)
        pixels[max(0, round(y) - 4) : round(y) + 4, columns] = 255
        if config["type"] == "hd":  # it pads with white
            pixels = 255 - pixels
        saw = seen_tokens(tiling, plan, Image.fromarray(pixels), num_images)
        if config["type"] == "hd":
            saw = 255 - saw
        assert len(saw) == len(places.boxes)
        for of_whole in (False, True):
            chosen = places.whole == of_whole
            if not chosen.any():
                continue
            boxes, light = places.boxes[chosen], saw[chosen]
            has_place = ~boxes[:, 0].isnan()
            centres = (boxes[:, :2] + boxes[:, 2:])[has_place] / 2
            weight = light[has_place][:, None]
            found = (centres * weight).sum(0) / weight.sum()
            cell = (boxes[:, 2:] - boxes[:, :2])[has_place].amax(0)
            off = (found - torch.tensor([x, y])).abs() / cell
            assert off.max() < 0.5, (found, x, y, cell)


@pytest.mark.parametrize("config", TILINGS, ids=str)
def test_a_map_of_one_token_peaks_there_and_sums_to_its_weight(config):
    image_size = (96, 64)
    _, _, places = places_of(config, image_size)
    size = map_size(image_size, 48)
    assert size == (32, 48)
    for token, box in enumerate(places.boxes):
        weights = torch.zeros(len(places.boxes))
        weights[token] = 0.25
        made = heat_map(weights, places, image_size, size)
        assert float(made.cells.sum()) + made.elsewhere == pytest.approx(0.25)
        if box[0].isnan():
            assert made.elsewhere == pytest.approx(0.25)
            continue
        rows, columns = (made.cells > 0).nonzero(as_tuple=True)
        if len(rows):
            left, top, right, bottom = (box / 2).tolist()  # two pixels of the image per cell
            assert left - 1 <= columns.min() and columns.max() <= right + 1
            assert top - 1 <= rows.min() and rows.max() <= bottom + 1
            assert made.elsewhere == 0


@pytest.mark.parametrize("config", TILINGS, ids=str)
def test_even_weights_cover_the_whole_image(config):
    _, _, places = places_of(config, (130, 40))
    weights = torch.full((len(places.boxes),), 1 / len(places.boxes))
    made = heat_map(weights, places, (130, 40), (8, 26))
    assert bool((made.cells > 0).all())
    assert float(made.cells.sum()) + made.elsewhere == pytest.approx(1.0)


def test_cells_in_another_order_or_of_no_place():
    turned = TokenCells(2, 4, (0, 4, 1, 5, 2, 6, 3, 7))  # columns before rows, laid out as (4, 2)
    _, _, places = places_of({"type": "resize"}, (80, 40), turned, (4, 2))
    assert places.boxes[1].tolist() == [0, 20, 20, 40]
    assert places.boxes[2].tolist() == [20, 0, 40, 20]
    ended = TokenCells(2, 2, (-1, 0, 1, 2, 3, -1))
    _, _, places = places_of({"type": "dynamic", "max_tiles": 2}, (80, 40), ended, (1, 6))
    assert places.boxes[[0, 5, 6, 11, 12, 17]].isnan().all()
    assert places.boxes[7].tolist() == [40, 0, 60, 20]
    assert places.whole.tolist() == [False] * 12 + [True] * 6


def test_a_padded_square_reaches_beyond_the_image():
    assert canvas_box((80, 40), build_tiling({"type": "pad"}), SIDE, (1, 1)) == (0, -20, 80, 60)
    assert canvas_box((80, 40), build_tiling({"type": "resize"}), SIDE, (1, 1)) == (0, 0, 80, 40)


def test_as_many_places_as_tokens():
    for config in TILINGS:
        tiling, plan, places = places_of(config, (97, 61))
        assert len(places.boxes) == num_image_tokens((97, 61), tiling, SIDE, GRID, plan.grid)


@pytest.mark.parametrize("tiling", ["resize", "pad", "anyres"])
@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
@pytest.mark.parametrize("pool", ["bilinear", "average", "max"])
def test_a_light_in_a_videos_frame_is_found_in_that_frame(tiling, newline, pool):
    cutter = VlmImageProcessor(SIDE, (6, 6), {"type": tiling}, (0, 0, 0))
    config = VideoConfig(pool=pool, stride=2, newline=newline)
    plan = plan_of(build_tiling(cutter.tiling), (0, 3))
    frames = [Image.new("RGB", (80, 48)) for _ in range(3)]
    x, y = 54, 20
    frames[2].paste("white", (x - 4, y - 4, x + 4, y + 4))
    video = SampledVideo(tuple(frames), (0.0, 1.0, 2.0), 3.0, 3)
    views = [view.convert("L").resize((6, 6)) for view in cutter.frame_views(video)]
    light = torch.from_numpy(np.stack([np.asarray(view) for view in views])).double()
    known = ((80, 48), build_tiling(cutter.tiling), SIDE, (6, 6))
    end = torch.zeros(1, dtype=torch.double)
    saw = lay_out(light.reshape(3, 36, 1), *known, newline=end, grid=(0, 3), video=config)[:, 0]
    places = token_places(*known, TokenCells(6, 6, tuple(range(36))), plan, config)
    assert len(places.boxes) == len(saw)
    brightest = int(saw.argmax())
    left, top, right, bottom = places.boxes[brightest].tolist()
    assert left <= x <= right and top <= y <= bottom and int(places.frame[brightest]) == 2
    assert bool((saw[places.frame < 2] == 0).all())
    even = torch.where(places.frame == 1, 1.0, 0.0)
    made = heat_map(even, places, (80, 48), (6, 10))
    assert bool((made.cells > 0).all()), "a frame is covered by its tokens"
