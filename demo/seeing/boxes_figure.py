"""How are the boxes of an answer drawn on its image?"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from demo.seeing.pictures import COLORS, INK, PAPER, picture_size
from vlm.seeing.boxes import Corners


def draw_boxes(image: Image.Image, boxes: Sequence[Corners]) -> Figure:
    """Return the image with numbered boxes, left, top, right, bottom in its pixels."""
    figure = Figure(figsize=picture_size(image.size), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image, extent=(0, image.width, image.height, 0), aspect="auto")
    axes.set_axis_off()
    for number, (left, top, right, bottom) in enumerate(boxes):
        color = COLORS[number % len(COLORS)]
        for width, edge in ((5.5, PAPER), (3.5, INK), (2.2, color)):  # seen on any picture
            frame = Rectangle((left, top), right - left, bottom - top, fill=False)
            frame.set(edgecolor=edge, linewidth=width)
            axes.add_patch(frame)
        axes.annotate(
            str(number + 1),
            (left, top),
            xytext=(5, -5),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=12,
            fontweight="bold",
            color=INK,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": PAPER},
        )
    axes.set_xlim(0, image.width)
    axes.set_ylim(image.height, 0)
    return figure
