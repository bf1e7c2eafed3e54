"""How is a map of attention drawn over its image, or over the frames of a video?

The image is pale, and from nothing over yellow to dark red the map grows darker in every way of
seeing colours. The scale counts in times of what an even spread over the image would be.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance
from torch import Tensor

from demo.seeing.pictures import INK, PAPER, picture_size

SATURATION, LIGHTNESS = 0.45, 0.45  # of the image: how much colour is left, how pale it is
LEAST = 4.0  # where the scale ends at least, so that an even spread does not look like a find
BAR = 0.62  # inches below the picture for the scale


def draw_heat(pictures: Sequence[Image.Image], maps: Sequence[Tensor]) -> Figure:
    """Return maps (rows, columns) over their pictures of one size, all of one scale."""
    weights = np.stack([cells.numpy() for cells in maps])
    total = float(weights.sum())
    times = weights * weights.size / total if total > 0 else weights
    highest = max(float(times.max()), LEAST)
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    size = (columns * pictures[0].width, rows * pictures[0].height)
    width, height = picture_size(size)
    whole = height + BAR
    figure = Figure(figsize=(width, whole), facecolor=PAPER)
    for number, (picture, shade) in enumerate(zip(pictures, times / highest, strict=True)):
        row, column = divmod(number, columns)
        bottom = (BAR + height * (1 - (row + 1) / rows)) / whole
        gap = 0.004 if len(pictures) > 1 else 0.0
        place = (column / columns, bottom, 1 / columns - gap, height / rows / whole - gap)
        axes = figure.add_axes(place)
        pale = np.asarray(ImageEnhance.Color(picture).enhance(SATURATION)) / 255
        extent = (0, picture.width, picture.height, 0)
        axes.imshow(LIGHTNESS + (1 - LIGHTNESS) * pale, extent=extent, aspect="auto")
        axes.imshow(_colors(shade), extent=extent, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
    _scale(figure, highest, whole)
    return figure


def _scale(figure: Figure, highest: float, height: float) -> None:
    """Draw what the colours mean below the pictures of a figure so many inches high."""
    strip = figure.add_axes((0.05, 0.36 / height, 0.9, 0.14 / height))
    strip.set_facecolor("#d0d0d0")
    strip.imshow(_colors(np.linspace(0, 1, 256)[None]), extent=(0, highest, 0, 1), aspect="auto")
    ticks = np.linspace(0, highest, 5)
    strip.set_xticks(list(ticks), labels=[f"{tick:.1f}×" for tick in ticks])
    strip.set_yticks([])
    strip.tick_params(labelsize=10, colors=INK, length=0)
    for side in strip.spines.values():
        side.set_visible(False)


def _colors(shade: np.ndarray) -> np.ndarray:
    """Return the colour and opacity (..., 4) of values in 0..1."""
    colors = colormaps["YlOrRd"](0.2 + 0.8 * shade)
    colors[..., 3] = 0.88 * shade**0.8
    return colors
