"""How do weights on an image's tokens become a map over its pixels?

Shapes: K tokens of the image, (rows, columns) of the map.

Each token's weight is spread evenly over the part of its box that lies in the image, so that the
map sums to the weights of the tokens that look at the image. Cells at its edge get their share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.seeing.token_places import TokenPlaces
from vlm.tiling import Size

LONGER_SIDE = 256  # cells of a map: finer than the tokens of any view


@dataclass(frozen=True)
class HeatMap:
    """A map over an image, and the weight that has no place on it.

    Attributes:
        cells: (rows, columns), the weight on each cell.
        elsewhere: the weight of tokens that see padding alone, or end a row.
    """

    cells: Tensor
    elsewhere: float


def map_size(image_size: Size, longer_side: int = LONGER_SIDE) -> Size:
    """Return (rows, columns) of the map of an image of (width, height) pixels."""
    width, height = image_size
    scale = longer_side / max(width, height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def heat_map(weights: Tensor, places: TokenPlaces, image_size: Size, size: Size) -> HeatMap:
    """Return the map of weights (K,) on an image's tokens.

    Args:
        weights: (K,) at least 0.
        places: of the K tokens.
        image_size: (width, height) in pixels.
        size: (rows, columns) of the map.
    """
    weights = weights.double()
    (rows, columns), (width, height) = size, image_size
    left, top, right, bottom = places.boxes.nan_to_num(0.0).unbind(1)
    across = _overlaps(left, right, width, columns)  # (K, columns)
    down = _overlaps(top, bottom, height, rows)  # (K, rows)
    area = across.sum(1) * down.sum(1)
    seen = area > 0
    density = torch.where(seen, weights / area.where(seen, torch.ones_like(area)), 0.0)
    cells = (down * density[:, None]).T @ across
    return HeatMap(cells, float(weights[~seen].sum()))


def _overlaps(low: Tensor, high: Tensor, length: float, count: int) -> Tensor:
    """Return (K, count), how much of each of `count` equal parts of 0..length lies in low..high."""
    edges = torch.linspace(0, length, count + 1, dtype=low.dtype)
    ends = torch.minimum(high[:, None], edges[None, 1:])
    starts = torch.maximum(low[:, None], edges[None, :-1])
    return (ends - starts).clamp(min=0)
