"""How is the choice among options drawn as it forms over the layers?"""

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from demo.seeing.pictures import COLORS, FADED, INK, PAPER
from vlm.answers import LETTERS

MARKERS = "osD^vP"
SPREAD = 0.055  # least distance of two labels, of the axis' height


def draw_options(probabilities: Tensor) -> Figure:
    """Return a chart of (depths, options) probabilities that add up to 1 at each depth.

    A line per option, from the embedding at the left to the last layer at the right, where its
    letter and its probability stand.
    """
    lines = probabilities.numpy().T
    figure = Figure(figsize=(6.0, 3.4), facecolor=PAPER)
    axes = figure.add_axes((0.09, 0.1, 0.71, 0.85))
    depths = np.arange(lines.shape[1])
    best = int(lines[:, -1].argmax())
    for number, line in enumerate(lines):
        axes.plot(
            depths,
            line,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=3 if number == best else 1.6,
            clip_on=False,
            zorder=3 if number == best else 2,
        )
    for number, place in enumerate(_apart(lines[:, -1])):
        axes.annotate(
            f"({LETTERS[number]}) {lines[number, -1]:.0%}",
            (1.03, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=11,
            fontweight="bold" if number == best else "normal",
            color=INK,
        )
        axes.plot(
            [1.015],
            [place],
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
    axes.set_xlim(0, max(1, depths[-1]))
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(min(8, len(depths)), integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.grid(axis="y", color=FADED, linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _apart(places: np.ndarray) -> np.ndarray:
    """Return heights of labels that do not cover each other, in the same order, within 0..1."""
    order = np.argsort(places, kind="stable")
    moved = places.astype(float).copy()
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + SPREAD)
    excess = moved[order[-1]] - 1.0
    if excess > 0:  # push back down from the top
        moved[order[-1]] = 1.0
        for above, below in pairwise(order[::-1]):
            moved[below] = min(moved[below], moved[above] - SPREAD)
    return moved
