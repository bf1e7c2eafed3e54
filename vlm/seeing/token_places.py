"""Which part of an image, or of a video's frame, was each of its tokens made from?

Shapes: T views, (h, w) tokens per view as a grid, N tokens per view, K num_image_tokens.

The layout itself (vlm/token_layout.py) puts the tokens in order: it gets boxes in place of
embeddings. Boxes are (left, top, right, bottom) in pixels of the image, and reach beyond it where a
view shows padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor

from connectors.base import TokenCells
from vlm.tile_grids import fit_inside, hd_size
from vlm.tiling import (
    AnyresTiling,
    HdTiling,
    PadTiling,
    ResizeTiling,
    Size,
    Tiling,
    ViewPlan,
)
from vlm.token_layout import lay_out, mosaic_size
from vlm.video_layout import VideoConfig, pooled_grid

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of one image look.

    Attributes:
        boxes: (K, 4) left, top, right, bottom in pixels of the image; NaN where a token has no
            place: row ends, separators, a connector's own ends.
        whole: (K,) bool, whether the token belongs to the view of the whole image beside tiles.
        frame: (K,) int, the frame of a video; 0 in images.
    """

    boxes: Tensor
    whole: Tensor
    frame: Tensor


def token_places(
    image_size: Size,
    tiling: Tiling,
    view_size: int,
    token_grid: Size,
    cells: TokenCells,
    plan: ViewPlan,
    video: VideoConfig | None = None,
) -> TokenPlaces:
    """Return where each token of an image, or of a video, looks.

    Args:
        image_size: (width, height) in pixels.
        tiling: how the image was cut.
        view_size: S, the side of a view in pixels.
        token_grid: (h, w) tokens of one view, as the layout has them.
        cells: where these tokens look in a view.
        plan: the views of this image, or the frames of this video.
        video: how videos are laid out.
    """
    if plan.frames and video is not None and video.pool == "max":  # the grid is the average's
        video = replace(video, pool="average")
    seen = list(view_boxes(image_size, tiling, view_size, plan))
    boxes = torch.tensor([_cell_boxes(box, cells) for box in seen], dtype=torch.float64)
    is_whole = torch.zeros(len(seen), len(cells.cells), 1, dtype=boxes.dtype)
    frame = torch.zeros_like(is_whole)
    if plan.frames:
        frame += torch.arange(plan.frames)[:, None, None]
    if plan.whole != "none" and len(seen) > 1:
        is_whole[0 if plan.whole == "first" else -1] = 1
    has_place = (~boxes[..., :1].isnan()).to(boxes.dtype)
    nowhere = torch.zeros(7, dtype=boxes.dtype)
    placed = lay_out(
        torch.cat([boxes.nan_to_num(0.0), is_whole, has_place, frame], dim=-1),
        *(image_size, tiling, view_size, token_grid),
        newline=nowhere,
        grid=plan.grid,
        separator=nowhere,
        video=video,
    )
    laid_out = placed[:, :4].masked_fill(placed[:, 5:6] < 1 - 1e-6, nan)
    places = TokenPlaces(laid_out, placed[:, 4] == 1, placed[:, 6].round().long())
    if plan.frames:
        assert video is not None, "a video's tokens need its config"
        rows, cols = pooled_grid(token_grid, video)
        if video.pool == "bilinear" or (rows, cols) == token_grid:
            return _grown(places, token_grid[1] / cols, token_grid[0] / rows)
        return _grown(places, video.stride, video.stride)
    if isinstance(tiling, AnyresTiling) and tiling.max_tiles is not None and plan.grid != (0, 0):
        full = mosaic_size(image_size, replace(tiling, max_tiles=None), plan.grid, token_grid)
        kept = mosaic_size(image_size, tiling, plan.grid, token_grid)
        places = _grown(places, full[1] / kept[1], full[0] / kept[0])
    return places


def view_boxes(image_size: Size, tiling: Tiling, view_size: int, plan: ViewPlan) -> Iterator[Box]:
    """Yield what part of the image each view shows, in the plan's order."""
    if plan.frames:
        square = PadTiling() if tiling.pads_frames else ResizeTiling()
        yield from [canvas_box(image_size, square, view_size, (1, 1))] * plan.frames
        return
    canvas = canvas_box(image_size, tiling, view_size, plan.grid)
    whole = canvas
    if plan.grid != (0, 0) and not tiling.pads_whole:
        whole = (0.0, 0.0, float(image_size[0]), float(image_size[1]))
    if plan.whole == "first":
        yield whole
    yield from _cut(canvas, plan.rows, plan.cols)
    if plan.whole == "last":
        yield whole


def canvas_box(image_size: Size, tiling: Tiling, view_size: int, grid: Size) -> Box:
    """Return the part of the plane that the tiles show, in pixels of the image.

    It is the image where it is stretched, and more than it where it is padded.
    """
    width, height = image_size
    if not tiling.pads:
        return 0.0, 0.0, float(width), float(height)
    if isinstance(tiling, PadTiling) or grid == (0, 0):
        scaled, canvas = image_size, (max(image_size), max(image_size))
    else:
        canvas = (grid[1] * view_size, grid[0] * view_size)
        scaled = fit_inside(image_size, canvas)
        if isinstance(tiling, HdTiling):
            scaled = hd_size(image_size, view_size, tiling.max_tiles, tiling.upscale)
    left, top = (canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2
    across, down = width / scaled[0], height / scaled[1]  # pixels of the image per canvas pixel
    return (
        *(-left * across, -top * down),
        *((canvas[0] - left) * across, (canvas[1] - top) * down),
    )


def _cut(box: Box, rows: int, cols: int) -> Iterator[Box]:
    """Yield the cells of a grid over a box, row by row."""
    left, top, right, bottom = box
    width, height = (right - left) / max(cols, 1), (bottom - top) / max(rows, 1)
    for row in range(rows):
        for col in range(cols):
            x, y = left + col * width, top + row * height
            yield x, y, x + width, y + height


def _cell_boxes(view: Box, cells: TokenCells) -> list[Box]:
    """Return the box of each token of a view that shows a box of the image."""
    grid = [*_cut(view, cells.rows, cells.columns), (nan, nan, nan, nan)]  # the last is cell -1
    return [grid[cell] for cell in cells.cells]


def _grown(places: TokenPlaces, across: float, down: float) -> TokenPlaces:
    """Return places whose tiles' tokens are so many times as wide and high, centres kept."""
    low, high = places.boxes[:, :2], places.boxes[:, 2:]
    half = (high - low) / 2 * torch.tensor([across, down], dtype=low.dtype)
    centre = (low + high) / 2
    grown = torch.cat([centre - half, centre + half], dim=1)
    return TokenPlaces(
        torch.where(places.whole[:, None], places.boxes, grown), places.whole, places.frame
    )
