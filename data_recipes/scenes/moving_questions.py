"""What can be asked about a moving scene, and what is the answer? Four tasks, none by one frame.

    Direction  "see yellow ball y3 x3 , y3 x5 right , so right (B)"
    Mover      "see cyan cone y1 x1 , y1 x1 none , yellow ball y3 x3 , y3 x5 right ,
                so right yellow ball (C)"
    Appear     "see y1 x1 cyan cone y1 x1 , y1 x5 white cube 1 , y3 x5 yellow ball y3 x3 ,
                y6 x2 cyan ball 2 , so 2 (A)"
    First      "see white cube none y6 x6 y6 x6 2 , cyan ball none none y1 x2 3 ,
                so 2 white cube (A)"

A reply writes down what must be seen first, then what follows: an object's place at the beginning
and at the end and where it went ("none": it stayed); what is there at the end, in reading order,
each with its place at the beginning or, if it had none, the number of the newcomer; where an object
is in each part of the clip (1, 2, 3), and in which it came. Every step needs the clip or what
stands just before, because small models learn to look and to copy long before they learn to compare
what lies far apart.
Wording of options and letters as in `questions.py`.
"""

from collections.abc import Sequence

import numpy as np

from data_recipes.scenes.moving import (
    APPEARING_AT,
    DIRECTIONS,
    MOST_APPEARING,
    NUM_FRAMES,
    MovingBatch,
)
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
    slots = {name(batch, row, k): k for k in np.flatnonzero(batch.scenes.exists[row]).tolist()}
    appearing = batch.slots(row, appearing=True)
    went = DIRECTIONS[batch.direction[row]]
    if task == "Direction":
        text = (
            f"Where is the {name(batch, row, 0)} at the end of the video, seen from where it was "
            "at the beginning?"
        )
        choices = _around(went, DIRECTIONS, place, rng)
        return Question(task, text, choices, place, f"{path(batch, row, 0)} , so {went}")
    if task == "Mover":
        truth = name(batch, row, 0)
        others = [name(batch, row, k) for k in batch.slots(row, appearing=False)[1:3]]
        choices = _around(truth, [truth, *others], place, rng)
        seen = [path(batch, row, slots[each]) for each in choices]
        text = "Which object moves in the video?"
        return Question(task, text, choices, place, " , ".join([*seen, f"so {went} {truth}"]))
    if task == "Appear":
        truth = str(len(appearing))
        choices = _around(truth, [str(n) for n in range(MOST_APPEARING + 1)], place, rng)
        text = "How many objects appear in the course of the video?"
        return Question(task, text, choices, place, f"{roll_call(batch, row)} , so {truth}")
    truth, other = (name(batch, row, k) for k in appearing[:2])
    choices = _around(truth, (truth, other), place, rng)
    text = f"Which object appears first in the video, the {choices[0]} or the {choices[1]}?"
    seen = [f"{each} {arrival(batch, row, slots[each])}" for each in choices]
    reasoning = " , ".join([*seen, f"so {part(batch, row, slots[truth])} {truth}"])
    return Question(task, text, choices, place, reasoning)


def name(batch: MovingBatch, row: int, slot: int) -> str:
    """Return an object's colour and shape, which no other object of the clip has."""
    scenes = batch.scenes
    return f"{COLOR_NAMES[scenes.color[row, slot]]} {SHAPES[scenes.shape[row, slot]]}"


def cell(batch: MovingBatch, row: int, slot: int, frame: int) -> str:
    """Return the cell of an object's centre at a frame."""
    scenes = batch.at(frame)
    return f"y{scenes.cell_y[row, slot]} x{scenes.cell_x[row, slot]}"


def path(batch: MovingBatch, row: int, slot: int) -> str:
    """Tell where an object is at the beginning and at the end, and where it went, or "none"."""
    ends = (cell(batch, row, slot, frame) for frame in (0, NUM_FRAMES - 1))
    went = DIRECTIONS[batch.direction[row]] if slot == 0 else "none"
    return f"{name(batch, row, slot)} {' , '.join(ends)} {went}"


def part(batch: MovingBatch, row: int, slot: int) -> int:
    """Return in which part of the clip, from 1, an object appears."""
    return 1 + APPEARING_AT.index(batch.appears[row, slot])


def arrival(batch: MovingBatch, row: int, slot: int) -> str:
    """Tell of each part of the clip where an object is then, or "none", and in which it came."""
    place, came = cell(batch, row, slot, NUM_FRAMES - 1), part(batch, row, slot)
    parts = range(1, len(APPEARING_AT) + 1)
    return " ".join(["none" if number < came else place for number in parts] + [str(came)])


def roll_call(batch: MovingBatch, row: int) -> str:
    """Tell of all that is there at the end where it was at the beginning, or number newcomers."""
    last, told, new = batch.at(NUM_FRAMES - 1), [], 0
    slots = np.flatnonzero(last.exists[row]).tolist()
    for slot in sorted(slots, key=lambda k: (last.cell_y[row, k], last.cell_x[row, k])):
        came = batch.appears[row, slot] > 0
        new += came
        origin = str(new) if came else cell(batch, row, slot, 0)
        told.append(f"{cell(batch, row, slot, NUM_FRAMES - 1)} {name(batch, row, slot)} {origin}")
    return " , ".join(told)


def _around(
    truth: str, options: Sequence[str], place: int, rng: np.random.Generator
) -> tuple[str, ...]:
    """Return the options in random order, the right one in its place."""
    others = [option for option in options if option != truth]
    order = [others[i] for i in rng.permutation(len(others))]
    return (*order[:place], truth, *order[place:])
