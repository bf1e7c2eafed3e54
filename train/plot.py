"""What did the loss do? One PNG per stage: raw and smoothed loss, learning rates below."""

from pathlib import Path
from typing import Any

INK, MUTED, LINE = "#1d2733", "#8a97a6", "#2f6fde"
RATE_COLORS = ("#d1495b", "#3a7d44", "#b07d2b")


def smooth(values: list[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, without the bias of its start."""
    keep = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else value)
    return result


def draw_loss(log: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw a training log (lines of `JsonLog`) as a PNG; does nothing for an empty log."""
    if not log:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in log]
    losses = [line["loss"] for line in log]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    marker = "o" if len(log) < 20 else ""
    top.plot(steps, losses, color=LINE, alpha=0.25, linewidth=1, marker=marker, markersize=3)
    averaged = smooth(losses, len(losses) / 20)
    summands = sorted({key for line in log for key in line if key.startswith("loss/")})
    top.plot(steps, averaged, color=LINE, linewidth=2, label="sum" if summands else None)
    for number, name in enumerate(summands):
        values = smooth([line[name] for line in log], len(log) / 20)
        top.plot(
            steps, values, color=RATE_COLORS[number], linewidth=1, label=name.partition("/")[2]
        )
    if summands:
        top.legend(frameon=False, fontsize=8, loc="upper right")
    top.annotate(
        f"{averaged[-1]:.3f}",
        (steps[-1], averaged[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=LINE,
        va="center",
        fontsize=10,
    )
    top.set_ylabel("loss" if summands else "loss per supervised token", color=INK)
    top.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    names = sorted({key for line in log for key in line if key.startswith("learning_rate/")})
    for number, name in enumerate(names):
        color = RATE_COLORS[number % len(RATE_COLORS)]
        rates = [line.get(name, float("nan")) for line in log]
        style = ("-", "--", ":")[number % 3]  # equal rates lie on each other
        label = name.partition("/")[2]
        bottom.plot(steps, rates, color=color, linestyle=style, linewidth=1.5, label=label)
    bottom.set_ylabel("learning rate", color=INK)
    bottom.set_xlabel("optimizer step", color=INK)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_ylim(bottom=0)
    bottom.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.grid(axis="y", color=MUTED, alpha=0.2)
    figure.savefig(path)
