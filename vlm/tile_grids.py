"""Which grid of tiles fits an image's size, and how is the picture put on it?

Shapes: a grid is (rows, cols) of tiles; sizes in pixels are (width, height), as PIL gives them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Size = tuple[int, int]
Color = tuple[int, int, int]

# `pad` makes a square of the longer side; beyond this side the image is shrunk before, not after.
_LARGEST_PADDED_SIDE = 8192


def best_fitting_grid(size: Size, view_size: int, candidates: Sequence[Size]) -> Size:
    """Return the (rows, cols) whose canvas keeps most of the image, then wastes least.

    "Keeps" is the scaled image's area, but never more than the original's, so small images often
    tie and the least waste decides; a full tie goes to the earlier candidate. After
    `select_best_resolution` of LLaVA-NeXT's mm_utils.
    """
    width, height = size
    best, most, least_waste = candidates[0], -1, 0
    for rows, cols in candidates:
        canvas_width, canvas_height = cols * view_size, rows * view_size
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_width * canvas_height - kept
        if kept > most or (kept == most and waste < least_waste):
            best, most, least_waste = (rows, cols), kept, waste
    return best


def nearest_grid(size: Size, view_size: int, min_tiles: int, max_tiles: int) -> Size:
    """Return the (rows, cols) with min_tiles..max_tiles tiles of the nearest aspect ratio.

    Among grids of exactly equal distance a larger one wins only if the image has more than half of
    its pixels. After `find_closest_aspect_ratio` of InternVL's dynamic_preprocess.
    """
    width, height = size
    sides = range(1, max_tiles + 1)
    shapes = [(c, r) for c in sides for r in sides if min_tiles <= c * r <= max_tiles]
    best, least = (1, 1), math.inf
    for cols, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        distance = abs(width / height - cols / rows)
        larger = width * height > 0.5 * view_size * view_size * cols * rows
        if distance < least or (distance == least and larger):
            best, least = (rows, cols), distance
    return best


def hd_size(size: Size, view_size: int, max_tiles: int, upscale: float | None) -> Size:
    """Return the (width, height) to which `hd` scales an image before it pads the shorter side.

    The longer side becomes as many views as max_tiles allows, and with `upscale` no more than that
    many times its own length, rounded up to whole views. After `HD_transform` of
    InternLM-XComposer's ixc_utils; a side of no pixel becomes one, where the reference fails.
    """
    width, height = size
    if width < height:
        turned = hd_size((height, width), view_size, max_tiles, upscale)
        return turned[1], turned[0]
    ratio = width / height
    count = 1
    while (count + 1) * math.ceil((count + 1) / ratio) <= max_tiles:
        count += 1
    if upscale is not None:
        count = min(count, math.ceil(width * upscale / view_size))
    new_width = count * view_size
    return new_width, max(1, int(new_width / ratio))


def fit_inside(size: Size, canvas_size: Size) -> Size:
    """Return the (width, height) of the image scaled, keeping its shape, to fit the canvas.

    The free side is rounded up and clamped (LLaVA-NeXT's `resize_and_pad_image`).
    """
    (width, height), (canvas_width, canvas_height) = size, canvas_size
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        return canvas_width, min(math.ceil(height * scale_x), canvas_height)
    return min(math.ceil(width * scale_y), canvas_width), canvas_height


def stretch(image: Image.Image, size: Size) -> Image.Image:
    """Return the image at exactly `size` (width, height), bicubic as the published models use."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def stretch_along(image: Image.Image, size: Size) -> Image.Image:
    """Return the image at `size`, bilinear, the longer side resized first (`HD_transform`)."""
    if image.width >= image.height:
        return image.resize(size, Image.Resampling.BILINEAR)
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    turned = turned.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return turned.transpose(Image.Transpose.TRANSPOSE)


def sample(image: Image.Image, size: Size) -> Image.Image:
    """Return the image at `size`, bicubic between the nearest pixels alone, as torch does it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    sampled = F.interpolate(pixels, (size[1], size[0]), mode="bicubic")[0]
    return Image.fromarray(sampled.round_().clamp_(0, 255).byte().permute(1, 2, 0).numpy())


def pad_to_square(image: Image.Image, color: Color) -> Image.Image:
    """Return the image centred on a square of `color` whose side is the image's longer one."""
    if max(image.size) > _LARGEST_PADDED_SIDE:  # a 1x50000 strip would make a 7.5 GB square
        side = _LARGEST_PADDED_SIDE
        image = stretch(image, fit_inside(image.size, (side, side)))
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def cut_tiles(canvas: Image.Image, grid: Size, view_size: int) -> list[Image.Image]:
    """Return the (view_size, view_size) tiles of the canvas, row by row."""
    rows, cols = grid
    assert canvas.size == (cols * view_size, rows * view_size), (canvas.size, grid, view_size)
    corners = [(col * view_size, row * view_size) for row in range(rows) for col in range(cols)]
    return [canvas.crop((x, y, x + view_size, y + view_size)) for x, y in corners]
