"""How do the tokens of an image's views become one sequence, and how many are they?

Shapes: T views, (h, w) tokens per view as a grid, N = h * w, E language-model width.

Tilings without a mosaic put view after view. The mosaic of `anyres` (LLaVA-NeXT, "spatial_unpad"):
the whole image's N tokens first, then the tiles as one picture of (rows * h, cols * w) tokens, cut
to the part that saw the image, shrunk if it exceeds anyres_max_N, each row closed by a newline.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.errors import UserError
from vlm.tiling import AnyresTiling, Size, Tiling

# anyres_max_N leaves the features alone until they exceed N tiles by this factor on each side.
_SHRINK_ABOVE = 1.1


def num_image_tokens(
    image_size: Size,
    tiling: Tiling,
    view_size: int,
    view_token_grid: Size,
    grid: Size | None = None,
) -> int:
    """Return how many tokens an image takes. The one function that counts.

    Args:
        image_size: (width, height) in pixels.
        tiling: how the image is cut.
        view_size: S, the side of a view in pixels.
        view_token_grid: (h, w) tokens of one view, after the connector.
        grid: (rows, cols) the image was cut into; None asks the tiling, as for a lone image.
    """
    plan = tiling.plan(*image_size, view_size) if grid is None else tiling.plan_of_grid(grid)
    height, width = view_token_grid
    if not isinstance(tiling, AnyresTiling):
        return plan.num_views * height * width
    if plan.grid == (0, 0):
        return height * width + tiling.unpad
    _, _, rows, cols = unpadded_box(image_size, plan.grid, view_token_grid, tiling.unpad)
    rows, cols = shrunk_size((rows, cols), view_token_grid, tiling.max_tiles)
    return height * width + rows * (cols + tiling.unpad)


def lay_out(
    view_tokens: Tensor,
    image_size: Size,
    tiling: Tiling,
    view_size: int,
    view_token_grid: Size,
    newline: Tensor | None = None,
    grid: Size | None = None,
) -> Tensor:
    """Join the tokens of one image's views (T, N, E) into its sequence (num_image_tokens, E).

    Args:
        view_tokens: tokens of each view, row-major over `view_token_grid`, views in plan order.
        image_size: (width, height) in pixels.
        tiling: how the image was cut.
        view_size: S, the side of a view in pixels.
        view_token_grid: (h, w) tokens of one view.
        newline: (E,) the learned row end; needed by a tiling that unpads.
        grid: (rows, cols) the image was cut into; None asks the tiling, as for a lone image.
    """
    plan = tiling.plan(*image_size, view_size) if grid is None else tiling.plan_of_grid(grid)
    assert len(view_tokens) == plan.num_views, (view_tokens.shape, plan)
    if not isinstance(tiling, AnyresTiling):
        return view_tokens.flatten(0, 1)
    whole, tiles = view_tokens[0], view_tokens[1:]
    row_end = None
    if tiling.unpad:
        assert newline is not None, "a tiling that unpads needs the newline embedding"
        row_end = newline.to(view_tokens)
    if plan.grid == (0, 0):
        return whole if row_end is None else torch.cat([whole, row_end[None]])

    (rows, cols), (height, width) = plan.grid, view_token_grid
    picture = tiles.unflatten(0, (rows, cols)).unflatten(2, (height, width))
    picture = picture.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # (rows h, cols w, E)
    top, left, kept_rows, kept_cols = unpadded_box(
        image_size, plan.grid, view_token_grid, tiling.unpad
    )
    picture = picture[top : top + kept_rows, left : left + kept_cols]
    target = shrunk_size((kept_rows, kept_cols), view_token_grid, tiling.max_tiles)
    if target != (kept_rows, kept_cols):
        channels_first = picture.permute(2, 0, 1)[None]
        shrunk = F.interpolate(channels_first, target, mode="bilinear")
        picture = shrunk[0].permute(1, 2, 0)
    if row_end is not None:
        ends = row_end.expand(picture.shape[0], 1, -1)
        picture = torch.cat([picture, ends], dim=1)
    return torch.cat([whole, picture.flatten(0, 1)])


def unpadded_box(
    image_size: Size, grid: Size, view_token_grid: Size, unpad: bool
) -> tuple[int, int, int, int]:
    """Return (top, left, rows, cols) of the mosaic's tokens that saw the image, not its padding.

    Removal is symmetric, so an odd remainder leaves one padded row in. The rounding to 7 digits is
    transformers' (`unpad_image` of its modeling_llava_next); LLaVA-NeXT truncates instead, and a
    176x55 image on 2 columns of 24 tokens gets 14 rows there and 16 here.
    """
    width, height = image_size
    total_rows, total_cols = grid[0] * view_token_grid[0], grid[1] * view_token_grid[1]
    if not unpad:
        return 0, 0, total_rows, total_cols
    if width / height > total_cols / total_rows:
        kept = int(round(height * (total_cols / width), 7))
        top = (total_rows - kept) // 2
        return top, 0, total_rows - 2 * top, total_cols
    kept = int(round(width * (total_rows / height), 7))
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
        record_ids: names of the rows, for the error.

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
        name = f"row {row}" if record_ids is None else f"record {record_ids[row]}"
        raise UserError(
            f"{sum(row_tokens)} image tokens in input_ids but {sum(image_tokens)} image features; "
            f"rows have {list(row_tokens)} tokens, images {list(image_tokens)} features; first "
            f"difference in {name}{names}"
        )
    return counts
