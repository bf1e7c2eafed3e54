"""What did the model say about which picture? A page of answers, right and wrong, as a PNG.

The first answers of each task are drawn, as they come: nothing is picked by how it went.
"""

import textwrap
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.runner import IMAGE
from eval.samples import Row
from eval.task import Task

PER_TASK = 4
LINE, MOST_LINES = 52, 6  # of text beside a picture
RIGHT, WRONG = "#1a7f37", "#b3261e"


def draw_gallery(task: Task, rows: Sequence[Row], breakdown: str, path: Path) -> None:
    """Draw the first `PER_TASK` answers of every group of `breakdown`, a row of pictures each.

    Args:
        task: gives the pictures.
        rows: answers of `SampleStore`; those without a picture are left out.
        breakdown: which of `row["groups"]` makes the rows of the page, such as "task".
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["index"]):
        if row["view"] == IMAGE and len(groups[row["groups"][breakdown]]) < PER_TASK:
            groups[row["groups"][breakdown]].append(row)
    figure, axes = plt.subplots(
        len(groups), PER_TASK, figsize=(4.1 * PER_TASK, 4.2 * len(groups)), squeeze=False
    )
    for line, name in zip(axes, sorted(groups), strict=True):
        for place in line:
            place.axis("off")
        for place, row in zip(line, groups[name], strict=False):
            _draw_answer(place, name, task.images(row["index"])[0], row)
    with warnings.catch_warnings():
        # A reply may hold letters that the figure's font lacks; they become boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.tight_layout()
        figure.savefig(path, dpi=70)
    plt.close(figure)


def _draw_answer(axes: Any, title: str, picture: Any, row: Row) -> None:
    """Draw one picture with its question above and the reply below."""
    letter = row["generation"] if "generation" in row else row["likelihood"]
    right = letter == row["answer"]
    axes.imshow(picture, interpolation="nearest")
    question = row["prompt"].partition(" Select from")[0]
    options = "  ".join(
        f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(row["choices"])
    )
    axes.set_title(
        "\n".join([title, *_lines(question), *_lines(options)]), fontsize=8.5, loc="left",
        parse_math=False,
    )  # fmt: skip
    reply = row.get("reply") or f"({letter})"
    verdict = "right" if right else f"wrong, it is ({row['answer']})"
    text = "\n".join([*_lines(reply), verdict])
    axes.text(
        0, -0.03, text, transform=axes.transAxes, va="top", fontsize=8.5,
        color=RIGHT if right else WRONG, parse_math=False,
    )  # fmt: skip


def _lines(text: str) -> list[str]:
    """Return at most `MOST_LINES` lines of printable text."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(printable, LINE, max_lines=MOST_LINES, placeholder=" ...")
