"""How are lengths, pictures and shares of a mixture drawn on one page?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_recipes.stats import SourceStats, summary
from vlm.errors import UserError

INK, MUTED = "#1d2733", "#8a97a6"
COLORS = ("#2f6fde", "#e4572e", "#3a7d44", "#b07d2b", "#7b4fa3", "#1b998b", "#d1495b", "#5c6b7a")
BINS = 50
MOST_IMAGES = 8  # more are one bar


def draw(stats: Sequence[SourceStats], path: Path, max_length: int | None = None) -> None:
    """Write a PNG: above, lengths, stacked by source; below, images of a record, and shares.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["lengths", "lengths"], ["images", "shares"]])
    colors = [COLORS[number % len(COLORS)] for number in range(len(stats))]
    # A record that was read stands for so many of the epoch.
    weights = [np.full(len(s.tokens), s.per_epoch / max(1, s.read)) for s in stats]

    lengths = axes["lengths"]
    tokens, names = [s.tokens for s in stats], [s.name for s in stats]
    lengths.hist(tokens, BINS, weights=weights, stacked=True, color=colors, label=names)
    if max_length is not None:
        lengths.axvline(max_length, color=INK, linewidth=1, linestyle="--")
        lengths.annotate(
            f"max_length {max_length}",
            (max_length, 0.95),
            fontsize=8,
            ha="right",
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            color=INK,
        )
    lengths.set_xlabel("tokens of a record, pictures included", color=INK)
    lengths.set_ylabel("records of an epoch", color=INK)
    lengths.legend(frameon=False, fontsize=8)
    lengths.set_title(summary(stats), loc="left", fontsize=10, color=INK)

    images = axes["images"]
    shown = [np.minimum(s.images, MOST_IMAGES) for s in stats]
    most = max((int(s.max()) for s in shown if len(s)), default=0)
    edges = [n - 0.5 for n in range(most + 2)]
    images.hist(shown, edges, weights=weights, stacked=True, color=colors, rwidth=0.8)
    labels = [f"{n}" if n < MOST_IMAGES else f"{n}+" for n in range(len(edges) - 1)]
    images.set_xticks(range(len(labels)), labels)
    images.set_xlabel("pictures of a record", color=INK)

    draw_shares(axes["shares"], stats, colors)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(colors=MUTED, labelcolor=INK)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def draw_shares(axes, stats: Sequence[SourceStats], colors: Sequence[str]) -> None:
    """Draw each source's share of an epoch's records, tokens and supervised tokens."""
    rows = {
        "supervised": [s.per_record(s.supervised) for s in stats],
        "tokens": [s.per_record(s.tokens) for s in stats],
        "records": [float(s.per_epoch) for s in stats],
    }
    for place, values in enumerate(rows.values()):
        left = 0.0
        for value, color in zip(values, colors, strict=True):
            share = 100 * value / max(sum(values), 1e-9)
            axes.barh(place, share, left=left, color=color)
            if share >= 8:
                axes.text(
                    left + share / 2,
                    place,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
            left += share
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("per cent of an epoch", color=INK)
