"""How is what the encoder sees of an image drawn on one page?

Left, the image on its tiles; right, every token as a cell of the colour it saw, in the order and
shape of the sequence, made by `lay_out` itself with colours in place of embeddings; below, the
views. Shapes: T views, (h, w) tokens per view, N = h * w, 3 colours in place of E.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vlm.seeing.token_places import canvas_box
from vlm.tiles_view import TilesView
from vlm.token_layout import lay_out, mosaic_size

INK, FADED, ACCENT, PAPER = "#1d2733", "#c9d0d8", "#e4572e", "#ffffff"
NEWLINE = (0.894, 0.341, 0.180)  # ACCENT
MAX_COLUMNS = 8  # views in a row of the page
PAGE_WIDTH, TOP_HEIGHT = 12.0, 5.4  # inches


def draw(view: TilesView, name: str) -> Figure:
    """Return the page for one image."""
    plan, views = view.plan, split(view)
    columns = min(MAX_COLUMNS, max(5, plan.cols + 1))
    rows = -(-len(views) // columns)
    views_height = rows * (PAGE_WIDTH / columns)
    figure = Figure(figsize=(PAGE_WIDTH, TOP_HEIGHT + views_height), dpi=110, facecolor=PAPER)
    panels: Any = figure.subfigures(2, 1, height_ratios=[TOP_HEIGHT, views_height])
    top, bottom = panels
    top.suptitle(name, color=INK, fontsize=15, fontweight="bold", x=0.025, y=0.975, ha="left")
    top.text(0.025, 0.885, view.summary(), color=INK, fontsize=11, ha="left")

    left, right = top.subplots(1, 2)
    top.subplots_adjust(left=0.025, right=0.975, top=0.8, bottom=0.04, wspace=0.06)
    draw_tiles(left, view)
    draw_tokens(right, view, views)
    axes = bottom.subplots(rows, columns, squeeze=False).flatten().tolist()
    bottom.subplots_adjust(left=0.025, right=0.975, top=0.97, bottom=0.03, wspace=0.05, hspace=0.05)
    draw_views(axes, views, plan.whole)
    return figure


def split(view: TilesView) -> list[Image.Image]:
    """Return the views of the image."""
    return view.tiling.split(view.image, view.view_size, view.mean_color, view.num_images)


def draw_tiles(axes: Axes, view: TilesView) -> None:
    """Show the image on its canvas with cut lines and order numbers; padding is hatched."""
    plan, side = view.plan, view.view_size
    rows, cols = (1, 1) if plan.grid == (0, 0) else plan.grid  # one padded view
    width, height = cols * side, rows * side
    title = "the image stretched to its tiles, numbered in order"
    if view.tiling.pads:
        title = "the image on its tiles; hatched: padding"
    shown = canvas_box(view.image.size, view.tiling, side, plan.grid)
    across, down = width / (shown[2] - shown[0]), height / (shown[3] - shown[1])
    left, top = -shown[0] * across, -shown[1] * down
    right, bottom = left + view.image.width * across, top + view.image.height * down
    axes.add_patch(
        Rectangle((0, 0), width, height, facecolor="#eef1f4", edgecolor=FADED, hatch="///")
    )
    axes.imshow(view.image, extent=(left, right, bottom, top), zorder=2)
    first = 2 if plan.whole == "first" and plan.num_views > 1 else 1
    for index in range(rows * cols):
        row, col = divmod(index, cols)
        corner = (col * side, row * side)
        axes.add_patch(
            Rectangle(corner, side, side, edgecolor=ACCENT, fill=False, linewidth=1.6, zorder=3)
        )
        axes.text(
            *((col + 0.5) * side, (row + 0.5) * side),
            str(index + first),
            **_badge(11 if cols < 7 else 8),
        )
    _frame(axes, width, height, title)


def token_blocks(view: TilesView, views: Sequence[Image.Image]) -> list[np.ndarray]:
    """Return the sequence as pictures (rows, columns, 3), each token one pixel of what it saw."""
    height, width = view.token_grid
    seen = [np.asarray(v.resize((width, height), Image.Resampling.BOX)) / 255 for v in views]
    tokens = torch.from_numpy(np.stack(seen)).flatten(1, 2)  # (T, N, 3)
    end = torch.tensor(NEWLINE, dtype=tokens.dtype)
    numbers = (view.image.size, view.tiling, view.view_size, view.token_grid)
    grid = view.plan.grid
    sequence = lay_out(tokens, *numbers, newline=end, grid=grid, separator=end).numpy()
    if not view.tiling.is_mosaic:
        return list(sequence.reshape(-1, height, width, 3))
    plan = view.plan
    if plan.grid == (0, 0):  # one padded view, and its newline
        whole, end_of_it = sequence[: height * width], sequence[height * width :]
        return [whole.reshape(height, width, 3), *end_of_it[:, None, None]]
    rows, cols = mosaic_size(view.image.size, view.tiling, plan.grid, view.token_grid)
    width += view.tiling.has_separator
    count = height * width if plan.whole == "first" else 0
    whole, rest = sequence[:count].reshape(-1, height, width, 3), sequence[count:]
    if view.tiling.has_separator:
        whole, rest = [*whole, rest[:1, None]], rest[1:]
    picture = [rest.reshape(rows, cols + view.tiling.has_newline, 3)] if rows else []
    return [*whole, *picture]


def draw_tokens(axes: Axes, view: TilesView, views: Sequence[Image.Image]) -> None:
    """Show the blocks of tokens from left to right, wrapped where there are many."""
    blocks = token_blocks(view, views)
    gap = max(1.0, max(view.token_grid) / 12)
    columns = len(blocks) if len(blocks) < 4 else int(np.ceil(np.sqrt(len(blocks) * 1.4)))
    x = y = right = row_height = 0.0
    for index, block in enumerate(blocks):
        if index and index % columns == 0:
            x, y, row_height = 0.0, y + row_height + gap, 0.0
        height, width = block.shape[:2]
        axes.imshow(block, extent=(x, x + width, y + height, y), interpolation="nearest")
        x, row_height = x + width + gap, max(row_height, float(height))
        right = max(right, x - gap)
    _frame(axes, right, y + row_height, describe_tokens(view))


def token_arithmetic(view: TilesView) -> str:
    """Return how the count comes about, in numbers: "24 x 24 + 48 x (48 + 1) = 2928"."""
    plan, (height, width) = view.plan, view.token_grid
    total = view.num_tokens()
    if not view.tiling.is_mosaic:
        return f"{plan.num_views} x {height} x {width} = {total}"
    if plan.grid == (0, 0):
        return f"{height} x {width}{' + 1' * view.tiling.has_newline} = {total}"
    rows, cols = mosaic_size(view.image.size, view.tiling, plan.grid, view.token_grid)
    whole = f"{height} x {width} + " if plan.whole == "first" else ""
    if view.tiling.has_separator:
        whole = f"{height} x ({width} + 1) + 1 + "
    columns = f"({cols} + 1)" if view.tiling.has_newline else f"{cols}"
    return f"{whole}{rows} x {columns} = {total}"


def describe_tokens(view: TilesView) -> str:
    """Return the arithmetic of the count, and what stands in orange."""
    ends = "; newlines orange" if view.tiling.has_newline else ""
    if view.tiling.has_separator:
        ends = "; separator and newlines orange"
    return f"tokens: {token_arithmetic(view)}{ends}"


def draw_views(axes: Sequence[Axes], views: Sequence[Image.Image], whole: str) -> None:
    """Show the views as the encoder gets them, numbered; hide the axes left over."""
    whole_index = {"none": None, "first": 0, "last": len(views) - 1}[whole]
    for index, place in enumerate(axes):
        place.set_axis_off()
        if index >= len(views):
            continue
        place.imshow(views[index])
        label = f"{index + 1}  whole" if index == whole_index else str(index + 1)
        place.text(0.04, 0.93, label, transform=place.transAxes, **_badge(9, "left", "top"))


def _badge(size: int, horizontal: str = "center", vertical: str = "center") -> dict[str, Any]:
    """Return the style of a number that is readable on any picture."""
    return {
        "ha": horizontal,
        "va": vertical,
        "color": PAPER,
        "fontsize": size,
        "fontweight": "bold",
        "zorder": 4,
        "bbox": {"boxstyle": "round,pad=0.35", "facecolor": INK, "edgecolor": "none", "alpha": 0.8},
    }


def _frame(axes: Axes, width: float, height: float, title: str) -> None:
    """Set equal scales with a small margin, no ticks, and the title."""
    margin = 0.01 * max(width, height)
    axes.set_xlim(-margin, width + margin)
    axes.set_ylim(height + margin, -margin)
    axes.set_aspect("equal", anchor="NW")
    axes.set_axis_off()
    axes.set_title(title, color=INK, fontsize=10, loc="left")
