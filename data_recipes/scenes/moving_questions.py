"""What can be asked about a moving scene, and what is the answer? Four tasks, none by one frame.

    Direction  "see yellow ball y3 x3 , y3 x5 , so right (B)"
    Mover      "see cyan cone y1 x1 , y1 x1 , yellow ball y3 x3 , y3 x5 , so yellow ball (C)"
    Appear     "see white cube y6 x6 , cyan cone y1 x2 , so 2 (A)"
    First      "see white cube y6 x6 , cyan cone y1 x2 , so white cube (A)"

A reply writes down places at the beginning and at the end, or what appears in its order, then what
follows; wording of options and letters as in `questions.py`.
"""

from collections.abc import Sequence

import numpy as np

from data_recipes.scenes.moving import DIRECTIONS, MOST_APPEARING, NUM_FRAMES, MovingBatch
from data_recipes.scenes.questions import Question
from data_recipes.scenes.vocabulary import COLOR_NAMES, SHAPES

TASKS = ("Direction", "Mover", "Appear", "First")
NUM_CHOICES = {"Direction": 4, "Mover": 3, "Appear": MOST_APPEARING + 1, "First": 2}


def ask(task: str, batch: MovingBatch, row: int, place: int, rng: np.random.Generator) -> Question:
    """Return a question of a task about one clip.

    Args:
        task: one of TASKS; First needs two objects that appear.
        batch: the clips.
        row: which of them.
        place: where the right option stands.
        rng: decides the order of the others.
    """
    if task == "Direction":
        truth = DIRECTIONS[batch.direction[row]]
        text = f"Which way does the {name(batch, row, 0)} move in the video?"
        choices = _around(truth, DIRECTIONS, place, rng)
        return Question(task, text, choices, place, f"{path(batch, row, 0)} , so {truth}")
    if task == "Mover":
        truth = name(batch, row, 0)
        others = [name(batch, row, k) for k in batch.slots(row, appearing=False)[1:3]]
        choices = _around(truth, [truth, *others], place, rng)
        slots = {name(batch, row, k): k for k in batch.slots(row, appearing=False)}
        seen = [path(batch, row, slots[each]) for each in choices]
        reasoning = " , ".join([*seen, f"so {truth}"])
        return Question(task, "Which object moves in the video?", choices, place, reasoning)
    appearing = batch.slots(row, appearing=True)
    seen = [f"{name(batch, row, k)} {cell(batch, row, k, NUM_FRAMES - 1)}" for k in appearing]
    if task == "Appear":
        truth = str(len(appearing))
        choices = _around(truth, [str(n) for n in range(MOST_APPEARING + 1)], place, rng)
        text = "How many objects appear in the course of the video?"
        return Question(
            task, text, choices, place, " , ".join([*(seen or ["none"]), f"so {truth}"])
        )
    truth, other = (name(batch, row, k) for k in appearing[:2])
    choices = _around(truth, (truth, other), place, rng)
    text = f"Which object appears first in the video, the {choices[0]} or the {choices[1]}?"
    return Question(task, text, choices, place, " , ".join([*seen, f"so {truth}"]))


def name(batch: MovingBatch, row: int, slot: int) -> str:
    """Return an object's colour and shape, which no other object of the clip has."""
    scenes = batch.scenes
    return f"{COLOR_NAMES[scenes.color[row, slot]]} {SHAPES[scenes.shape[row, slot]]}"


def cell(batch: MovingBatch, row: int, slot: int, frame: int) -> str:
    """Return the cell of an object's centre at a frame."""
    scenes = batch.at(frame)
    return f"y{scenes.cell_y[row, slot]} x{scenes.cell_x[row, slot]}"


def path(batch: MovingBatch, row: int, slot: int) -> str:
    """Tell where an object is at the beginning and at the end."""
    ends = (cell(batch, row, slot, frame) for frame in (0, NUM_FRAMES - 1))
    return f"{name(batch, row, slot)} {' , '.join(ends)}"


def _around(
    truth: str, options: Sequence[str], place: int, rng: np.random.Generator
) -> tuple[str, ...]:
    """Return the options in random order, the right one in its place."""
    others = [option for option in options if option != truth]
    order = [others[i] for i in rng.permutation(len(others))]
    return (*order[:place], truth, *order[place:])
