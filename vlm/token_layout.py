"""How do the tokens of an image's views become one sequence, and how many are they?

Shapes: T views, (h, w) tokens per view as a grid, N = h * w, E language-model width.

Tilings without a mosaic put view after view. The mosaic of `anyres` (LLaVA-NeXT, "spatial_unpad"):
the whole image's N tokens first, then the tiles as one picture of (rows * h, cols * w) tokens, cut
to the part that saw the image, shrunk if it exceeds anyres_max_N, each row closed by a newline.
That of `pad` with `unpad` (Cambrian-1) is its one view as such a picture. That of `hd`
(XComposer2-4KHD) closes the rows of the whole image too, puts a separator after them, and keeps
tokens of padding.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.errors import UserError
from vlm.tiling import AnyresTiling, Size, Tiling, ViewPlan, is_video, plan_of
from vlm.video_layout import (
    VideoConfig,
    gather_windows,
    lay_out_video,
    num_video_tokens,
    spread_windows,
)

# anyres_max_N leaves the features alone until they exceed N tiles by this factor on each side.
_SHRINK_ABOVE = 1.1


def num_image_tokens(
    image_size: Size,
    tiling: Tiling,
    view_size: int,
    view_token_grid: Size,
    grid: Size | None = None,
    video: VideoConfig | None = None,
) -> int:
    """Return how many tokens an image or a video takes. The one function that counts.

    Args:
        image_size: (width, height) in pixels.
        tiling: how the image is cut.
        view_size: S, the side of a view in pixels.
        view_token_grid: (h, w) tokens of one view, after the connector.
        grid: (rows, cols) the image was cut into; None asks the tiling, as for a lone image; (0, n)
            is a video of n frames.
        video: how videos are laid out.
    """
    if grid is not None and is_video(grid):
        assert video is not None, "a video's tokens need its config"
        return num_video_tokens(grid[1], view_token_grid, video)
    plan = tiling.plan(*image_size, view_size) if grid is None else tiling.plan_of_grid(grid)
    if not tiling.is_mosaic:
        return plan.num_views * view_token_grid[0] * view_token_grid[1]
    whole = _whole_size(plan, tiling, view_token_grid)
    if plan.grid == (0, 0):
        return whole + tiling.has_newline
    rows, cols = mosaic_size(image_size, tiling, plan.grid, view_token_grid)
    return whole + rows * (cols + tiling.has_newline)


def lay_out(
    view_tokens: Tensor,
    image_size: Size,
    tiling: Tiling,
    view_size: int,
    view_token_grid: Size,
    newline: Tensor | None = None,
    grid: Size | None = None,
    separator: Tensor | None = None,
    video: VideoConfig | None = None,
    window: int = 1,
) -> Tensor:
    """Join the tokens of one image's views, or a video's frames, (T, N, E) into its sequence.

    It is (num_image_tokens, E).

    Args:
        view_tokens: tokens of each view, row-major over `view_token_grid`, views in plan order.
        image_size: (width, height) in pixels.
        tiling: how the image was cut.
        view_size: S, the side of a view in pixels.
        view_token_grid: (h, w) tokens of one view.
        newline: (E,) the learned row end, where the tiling has one.
        grid: (rows, cols) the image was cut into; None asks the tiling, as for a lone image.
        separator: (E,) what stands after the whole image, where the tiling has it.
        video: how videos are laid out.
        window: where a token's numbers are those of a window, see `lay_out_video`.
    """
    if grid is not None and is_video(grid):
        assert video is not None and len(view_tokens) == grid[1], (view_tokens.shape, grid)
        return lay_out_video(view_tokens, view_token_grid, video, newline, window)
    plan = tiling.plan(*image_size, view_size) if grid is None else tiling.plan_of_grid(grid)
    assert len(view_tokens) == plan.num_views, (view_tokens.shape, plan)
    if not tiling.is_mosaic:
        tokens = view_tokens.flatten(0, 1)
        # A newline that only videos have is still used: all ranks train the same parameters.
        return tokens if newline is None else tokens + 0.0 * newline.sum().to(tokens)
    count = 1 if plan.whole == "first" else 0
    whole, tiles = view_tokens[:count].flatten(0, 1), view_tokens[count:]
    row_end = None
    if tiling.has_newline:
        assert newline is not None, "a tiling with row ends needs the newline embedding"
        row_end = newline.to(view_tokens)
    if plan.grid == (0, 0):
        return whole if row_end is None else torch.cat([whole, row_end[None]])
    if tiling.has_separator:
        assert separator is not None, "this tiling needs the separator's embedding"
        closed = _close_rows(whole.unflatten(0, view_token_grid), row_end)
        whole = torch.cat([closed, separator.to(view_tokens)[None]])

    (rows, cols), (height, width) = plan.grid, view_token_grid
    picture = tiles.unflatten(0, (rows, cols)).unflatten(2, (height, width))
    picture = picture.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # (rows h, cols w, E)
    top, left, kept_rows, kept_cols = _mosaic_box(image_size, tiling, plan.grid, view_token_grid)
    picture = picture[top : top + kept_rows, left : left + kept_cols]
    target = mosaic_size(image_size, tiling, plan.grid, view_token_grid)
    if target != (kept_rows, kept_cols):
        channels_first = spread_windows(picture[None], window).permute(0, 3, 1, 2)
        size = (target[0] * window, target[1] * window)
        shrunk = F.interpolate(channels_first, size, mode="bilinear")
        picture = gather_windows(shrunk.permute(0, 2, 3, 1), window)[0]
    return torch.cat([whole, _close_rows(picture, row_end)])


def _close_rows(picture: Tensor, row_end: Tensor | None) -> Tensor:
    """Return the tokens of a picture (rows, cols, E) in a row, a row end (E,) after each row."""
    if row_end is not None:
        picture = torch.cat([picture, row_end.expand(len(picture), 1, -1)], dim=1)
    return picture.flatten(0, 1)


def _whole_size(plan: ViewPlan, tiling: Tiling, view_token_grid: Size) -> int:
    """Return how many tokens stand before those of the mosaic."""
    if plan.whole != "first":
        return 0
    height, width = view_token_grid
    return height * (width + 1) + 1 if tiling.has_separator else height * width


def mosaic_size(image_size: Size, tiling: Tiling, grid: Size, view_token_grid: Size) -> Size:
    """Return (rows, cols) of the tokens of a mosaic, newlines not counted.

    Args:
        image_size: (width, height) in pixels.
        tiling: one with a mosaic.
        grid: (rows, cols) the image was cut into.
        view_token_grid: (h, w) tokens of one view.
    """
    _, _, rows, cols = _mosaic_box(image_size, tiling, grid, view_token_grid)
    max_tiles = tiling.max_tiles if isinstance(tiling, AnyresTiling) else None
    return shrunk_size((rows, cols), view_token_grid, max_tiles)


def shown_parts(image_size: Size, tiling: Tiling, grid: Size, feature_grid: Size) -> Tensor:
    """Return where an image's views show it, (T, H, W) bool; False on what pads it.

    As `unmask_attention_mask` in `cambrian/model/cambrian_arch.py`, but for the rounding.

    Args:
        image_size: (width, height) in pixels.
        tiling: how the image was cut.
        grid: (rows, cols) it was cut into.
        feature_grid: (H, W) of a view.
    """
    height, width = feature_grid
    plan = plan_of(tiling, grid)
    whole = torch.ones(1, height, width, dtype=torch.bool)
    if not (tiling.pads_frames if plan.frames else tiling.pads):
        return whole.expand(plan.num_views, -1, -1)
    if plan.frames:
        top, left, kept_rows, kept_cols = unpadded_box(image_size, (1, 1), feature_grid, True, 1)
        frame = torch.zeros_like(whole)
        frame[:, top : top + kept_rows, left : left + kept_cols] = True
        return frame.expand(plan.frames, -1, -1)
    rows, cols = (1, 1) if grid == (0, 0) else grid
    least = 1 if tiling.pads_whole else 0
    box = unpadded_box(image_size, (rows, cols), feature_grid, True, least)
    top, left, kept_rows, kept_cols = box
    picture = torch.zeros(rows * height, cols * width, dtype=torch.bool)
    picture[top : top + kept_rows, left : left + kept_cols] = True
    tiles = picture.reshape(rows, height, cols, width).transpose(1, 2).flatten(0, 1)
    if tiling.pads_whole:  # a cell of it is the place of rows x cols cells of the picture
        whole = picture.reshape(1, height, rows, width, cols).any(4).any(2)
    # With tiles, the whole image is stretched, or shows the same canvas.
    return tiles if len(tiles) == plan.num_views else torch.cat([whole, tiles])


def _mosaic_box(
    image_size: Size, tiling: Tiling, grid: Size, view_token_grid: Size
) -> tuple[int, int, int, int]:
    """Return `unpadded_box` of a mosaic; something is left of an image that has nothing else."""
    least = 1 if tiling.plan_of_grid(grid).whole == "none" else 0
    return unpadded_box(image_size, grid, view_token_grid, tiling.unpads, least)


def unpadded_box(
    image_size: Size, grid: Size, view_token_grid: Size, unpad: bool, least: int = 0
) -> tuple[int, int, int, int]:
    """Return (top, left, rows, cols) of the mosaic's tokens that saw the image, not its padding.

    At least `least` rows and columns. Removal is symmetric, so an odd remainder leaves one padded
    row in. The rounding to 7 digits is transformers' (`unpad_image` of its modeling_llava_next);
    LLaVA-NeXT truncates instead, and a 176x55 image on 2 columns of 24 tokens gets 14 rows there
    and 16 here.
    """
    width, height = image_size
    total_rows, total_cols = grid[0] * view_token_grid[0], grid[1] * view_token_grid[1]
    if not unpad:
        return 0, 0, total_rows, total_cols
    if width / height > total_cols / total_rows:
        kept = max(least, int(round(height * (total_cols / width), 7)))
        top = (total_rows - kept) // 2
        return top, 0, total_rows - 2 * top, total_cols
    kept = max(least, int(round(width * (total_rows / height), 7)))
    left = (total_cols - kept) // 2
    return 0, left, total_rows, total_cols - 2 * left


def shrunk_size(size: Size, view_token_grid: Size, max_tiles: int | None) -> Size:
    """Return the (rows, cols) to which anyres_max_N interpolates a mosaic of `size` tokens."""
    if max_tiles is None:
        return size
    rows, cols = size
    factor = math.sqrt(rows * cols / (max_tiles * view_token_grid[0] * view_token_grid[1]))
    if factor <= _SHRINK_ABOVE:
        return size
    return max(1, int(rows // factor)), max(1, int(cols // factor))


def images_per_row(
    row_tokens: Sequence[int],
    image_tokens: Sequence[int],
    record_ids: Sequence[str] | None = None,
) -> list[int]:
    """Return how many of the batch's images, taken in order, each row holds.

    Args:
        row_tokens: (B,) image tokens found in each row.
        image_tokens: (n,) tokens that each image takes.
        record_ids: names of the rows, or of the documents packed in them, for the error.

    Raises:
        UserError: the tokens of a row are not those of whole images, or images are left over.
    """
    counts, used = [], 0
    for tokens in row_tokens:
        start, total = used, 0
        while total < tokens and used < len(image_tokens):
            total, used = total + image_tokens[used], used + 1
        if total != tokens:
            break
        counts.append(used - start)
    if len(counts) < len(row_tokens) or used < len(image_tokens):
        row = min(len(counts), len(row_tokens) - 1)
        names = "" if record_ids is None else f" (records {', '.join(map(str, record_ids))})"
        name = f"row {row}"
        if record_ids is not None and len(record_ids) == len(row_tokens):
            name = f"record {record_ids[row]}"
        raise UserError(
            f"{sum(row_tokens)} image tokens in input_ids but {sum(image_tokens)} image features; "
            f"rows have {list(row_tokens)} tokens, images {list(image_tokens)} features; first "
            f"difference in {name}{names}"
        )
    return counts
