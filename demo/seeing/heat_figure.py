"""How is a map of attention drawn over its image?

The image is pale, and from nothing over yellow to dark red the map grows darker in every way of
seeing colours. The scale counts in times of what an even spread over the image would be.
"""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance
from torch import Tensor

from demo.seeing.pictures import INK, PAPER, picture_size

SATURATION, LIGHTNESS = 0.45, 0.45  # of the image: how much colour is left, how pale it is
BAR = 0.62  # inches below the picture for the scale


def draw_heat(image: Image.Image, cells: Tensor) -> Figure:
    """Return the map (rows, columns) over the image."""
    weights = cells.numpy()
    total = float(weights.sum())
    times = weights * weights.size / total if total > 0 else weights
    highest = max(float(times.max()), 1.0)
    width, height = picture_size(image.size)
    whole = height + BAR
    figure = Figure(figsize=(width, whole), facecolor=PAPER)
    axes = figure.add_axes((0, BAR / whole, 1, height / whole))
    pale = np.asarray(ImageEnhance.Color(image).enhance(SATURATION)) / 255
    extent = (0, image.width, image.height, 0)
    axes.imshow(LIGHTNESS + (1 - LIGHTNESS) * pale, extent=extent, aspect="auto")
    axes.imshow(_colors(times / highest), extent=extent, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    strip = figure.add_axes((0.05, 0.36 / whole, 0.9, 0.14 / whole))
    strip.set_facecolor("#d0d0d0")
    strip.imshow(_colors(np.linspace(0, 1, 256)[None]), extent=(0, highest, 0, 1), aspect="auto")
    ticks = np.linspace(0, highest, 5)
    strip.set_xticks(list(ticks), labels=[f"{tick:.1f}×" for tick in ticks])
    strip.set_yticks([])
    strip.tick_params(labelsize=10, colors=INK, length=0)
    for side in strip.spines.values():
        side.set_visible(False)
    return figure


def _colors(shade: np.ndarray) -> np.ndarray:
    """Return the colour and opacity (..., 4) of values in 0..1."""
    colors = colormaps["YlOrRd"](0.2 + 0.8 * shade)
    colors[..., 3] = 0.88 * shade**0.8
    return colors
