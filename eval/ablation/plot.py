"""What does accuracy cost? One PNG: scores against arithmetic and against time, with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ablation.table_text import total_flops

Json = Mapping[str, Any]
INK, MUTED, FIRST, OTHER, EDGE = "#1d2733", "#8a97a6", "#d1495b", "#2f6fde", "#3a7d44"
SIZE = (13, 6.5)  # inches
DPI = 150
# Where a label may stand, in points from its point: near ones first.
ANGLES = [(1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1)]
REACHES = (9, 18, 30, 45, 65, 90)
Spans = dict[str, tuple[float, float, float]]  # name -> cost, low, high
Box = tuple[float, float, float, float]  # left, bottom, right, top


def draw(report: Json, path: Path) -> bool:
    """Draw the picture; False, and none is drawn, where no row was both scored and measured."""
    column = report["columns"][0]
    shown = {
        name: row
        for name, row in report["rows"].items()
        if row["scores"] and "prefill_ms" in row["costs"]
    }
    if not shown:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    costs = {name: row["costs"] for name, row in shown.items()}
    flops: Spans = {}
    for name, own in costs.items():
        flops[name] = (total_flops(own) / 1e6, total_flops(own) / 1e6, total_flops(own) / 1e6)
    times: Spans = {
        name: (c["prefill_ms"], c["prefill_ms_low"], c["prefill_ms_high"])
        for name, c in costs.items()
    }
    cells = {name: row["scores"][column["name"]] for name, row in shown.items()}
    first = next(iter(report["rows"]))
    titles = (
        "MFLOP per picture: encoder, connector, language model",
        "milliseconds to the first token of the reply (bars: quartiles)",
    )
    for axes, values, title in zip(panels, (flops, times), titles, strict=True):
        _panel(axes, values, cells, first, column["chance"])
        axes.set_xlabel(title, color=INK)
    panels[0].set_ylabel(f"{column['name']}, % (bars: 95 % intervals)", color=INK)
    figure.canvas.draw()  # fixes the axes, so that labels can be placed in their pixels
    figure.set_layout_engine("none")
    for axes, values in zip(panels, (flops, times), strict=True):
        _label(axes, values, cells)
    figure.savefig(path)
    return True


def _panel(
    axes: Any,
    costs: Spans,
    cells: Mapping[str, Json],
    first: str,
    chance: float,
) -> None:
    """Draw one panel: points with bars, the edge of what is worth its cost, chance."""
    for name, (cost, low, high) in costs.items():
        value, below, above = (100 * cells[name][key] for key in ("accuracy", "low", "high"))
        axes.errorbar(
            cost,
            value,
            xerr=None if low == high else [[cost - low], [high - cost]],
            yerr=[[max(0.0, value - below)], [max(0.0, above - value)]],
            color=FIRST if name == first else OTHER,
            fmt="o",
            markersize=6,
            elinewidth=1,
            alpha=0.9,
        )
    edge = worth_it({name: (costs[name][0], cells[name]["accuracy"]) for name in costs})
    axes.step(
        [costs[name][0] for name in edge],
        [100 * cells[name]["accuracy"] for name in edge],
        where="post",
        color=EDGE,
        linewidth=1,
        alpha=0.5,
        zorder=0,
    )
    axes.set_title("green: no row is both cheaper and better", loc="right", fontsize=8, color=MUTED)
    lowest = min(100 * cell["low"] for cell in cells.values())
    if 100 * chance > lowest - 20:  # elsewhere the line would press all points together
        axes.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
        axes.annotate("chance", (0.995, 100 * chance), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize=8, color=MUTED)  # fmt: skip
    spread = [cost for cost, *_ in costs.values()]
    if max(spread) > 8 * min(spread):
        axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.grid(color=MUTED, alpha=0.15)


def worth_it(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names that no other beats in both, cheapest first.

    Args:
        points: name -> (cost, score).
    """
    chosen: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not chosen or points[name][1] > points[chosen[-1]][1]:
            chosen.append(name)
    return chosen


def _label(axes: Any, costs: Spans, cells: Mapping[str, Json]) -> None:
    """Write each name beside its point, where it covers as little as possible."""
    scale = DPI / 72
    places, taken = {}, []
    for name, (cost, low, high) in costs.items():
        value, below, above = (100 * cells[name][key] for key in ("accuracy", "low", "high"))
        corners = [(cost, value), (low, below), (high, above)]
        (x, y), (left, bottom), (right, top) = axes.transData.transform(corners)
        places[name] = (x, y)
        taken += [(x - 8, y - 8, x + 8, y + 8), (left, y - 2, right, y + 2)]
        taken.append((x - 2, bottom, x + 2, top))
    inside = axes.get_window_extent().extents
    for name in sorted(places, key=lambda name: -places[name][1]):
        x, y = places[name]
        text = axes.annotate(name, (x, y), xycoords="figure pixels", fontsize=8, color=INK)
        extent = text.get_window_extent()
        text.remove()
        reach, box = place(x, y, extent.width, extent.height, taken, tuple(inside), scale)
        taken.append(box)
        axes.annotate(
            name,
            (costs[name][0], 100 * cells[name]["accuracy"]),
            xytext=((box[0] - x) / scale, (box[1] - y) / scale),
            textcoords="offset points",
            va="bottom",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6}
            if reach > REACHES[1]
            else None,
        )


def place(
    x: float,
    y: float,
    width: float,
    height: float,
    taken: Sequence[Box],
    inside: Sequence[float],
    scale: float = 1.0,
) -> tuple[float, Box]:
    """Return (distance in points, box in pixels) of the place that covers least, near ones first.

    Args:
        x: of the point, in pixels.
        y: likewise.
        width: of the label, in pixels.
        height: likewise.
        taken: boxes to keep free of.
        inside: left, bottom, right and top of where labels may stand.
        scale: pixels per point.
    """
    found = []
    for reach in REACHES:
        for across, up in ANGLES:
            middle_x = x + across * (reach * scale + width / 2)
            middle_y = y + up * (reach * scale + height / 2)
            box = (
                middle_x - width / 2,
                middle_y - height / 2,
                middle_x + width / 2,
                middle_y + height / 2,
            )
            outside = width * height - overlap(box, inside)
            covered = sum(overlap(box, other) for other in taken) + outside
            if covered <= 0.01 * width * height:
                return reach, box
            found.append((covered, reach, box))
    _, reach, box = min(found, key=lambda entry: entry[0])
    return reach, box


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
