"""How are the frames of a video drawn that the model sees? In order, each with its time."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from demo.seeing.pictures import INK, PAPER

WIDTH, LABEL = 6.0, 0.22  # inches of the page, and of the line with a frame's time


def draw_frames(frames: Sequence[Image.Image], times: Sequence[float]) -> Figure:
    """Return square frames and their times in seconds on one page."""
    columns = min(len(frames), max(3, int(np.ceil(np.sqrt(len(frames))))))
    rows = -(-len(frames) // columns)
    side = WIDTH / columns
    height = rows * (side + LABEL)
    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    for number, (frame, time) in enumerate(zip(frames, times, strict=True)):
        row, column = divmod(number, columns)
        bottom = 1 - (row + 1) * (side + LABEL) / height
        axes = figure.add_axes((column / columns, bottom, 0.985 / columns, side / height))
        axes.imshow(frame, aspect="auto")
        axes.set_axis_off()
        axes.set_title(f"{time:.1f} s", fontsize=9, color=INK, pad=3)
    return figure
