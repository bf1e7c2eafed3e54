"""What can be asked about a scene, and what is the answer? CV-Bench's four tasks and captions.

Every question follows CV-Bench's wording and options. Where the right option stands is decided by
the caller, so that the text alone says nothing about the letter. A reply in words writes down what
must be seen first, then what follows from it:

    Relation  "see red x2 , blue x6 , so left (A)"
    Depth     "see red z1 ball , blue z5 cone , so red z1 ball (B)"
    Distance  "see red x2 red y3 red z1 , blue x6 dx4 blue y3 dy0 blue z2 dz1 d5 cone ,
               green x3 dx1 green y6 dy3 green z1 dz0 d3 cube , so green d3 cube (A)"
    Count     "see ball y2 x1 , ball y3 x5 , so 2 (C)"

What is looked up always follows the word it is looked up by ("red x2 red y3", not "red x2 y3"), and
a conclusion repeats its observation: small models learn to look and to copy long before they learn
to carry a word along.
"""

from dataclasses import dataclass

import numpy as np

from data_recipes.scenes.layout import MOST_COUNTED, Difficulty, SceneBatch, distance_bin
from data_recipes.scenes.vocabulary import BOX_NAMES, COLOR_NAMES, NUM_CELLS, PLURALS, SHAPES

REFERRED = 6  # objects in one request to describe, at most
TASKS = ("Relation", "Count", "Depth", "Distance")
LETTERS = "ABCDEF"
SELECT = "Select from the following choices."
CAPTION_PROMPT = "Describe the image."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
COUNT_WINDOWS = tuple((low, size) for size in (4, 5, 6) for low in range(MOST_COUNTED + 2 - size))


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        task: one of TASKS.
        text: the question without its options.
        choices: the options' texts, in order.
        answer: index of the right option.
        reasoning: what a reader of the picture writes down before the letter.
    """

    task: str
    text: str
    choices: tuple[str, ...]
    answer: int
    reasoning: str

    @property
    def letter(self) -> str:
        """The right option as CV-Bench writes it, "(A)"."""
        return f"({LETTERS[self.answer]})"

    @property
    def prompt(self) -> str:
        """Question and options in CV-Bench's prompt format."""
        options = "".join(f"\n({LETTERS[i]}) {text}" for i, text in enumerate(self.choices))
        return f"{self.text} {SELECT}{options}"

    @property
    def reply(self) -> str:
        """The reply that writes out its observations first."""
        return f"see {self.reasoning} {self.letter}"


def relation(scenes: SceneBatch, row: int, vertical: bool, answer: int) -> Question:
    """Ask where the object in the red box is, seen from the one in the blue box."""
    red, blue = _boxed(scenes, row, 1), _boxed(scenes, row, 2)
    axis, cells = ("y", scenes.cell_y) if vertical else ("x", scenes.cell_x)
    words = ("above", "below") if vertical else ("left", "right")
    values = (scenes.y if vertical else scenes.x)[row]
    truth = words[int(values[red] > values[blue])]
    other = words[int(values[red] <= values[blue])]
    names = _names(scenes, row, (red, blue))
    text = (
        f"Considering the relative positions of the {names[0]} (annotated by the red box) and the "
        f"{names[1]} (annotated by the blue box) in the image provided, where is the {names[0]} "
        f"located with respect to the {names[1]}?"
    )
    reasoning = f"red {axis}{cells[row, red]} , blue {axis}{cells[row, blue]} , so {truth}"
    return Question("Relation", text, _order(truth, other, answer), answer, reasoning)


def depth(scenes: SceneBatch, row: int, answer: int) -> Question:
    """Ask which of the objects in the red and the blue box is closer to the camera."""
    slots = (_boxed(scenes, row, 1), _boxed(scenes, row, 2))
    names = _names(scenes, row, slots)
    near = nearer_box(scenes, row)
    bins = [scenes.depth_bin[row, slot] for slot in slots]
    text = (
        f"Which object is closer to the camera taking this photo, the {names[0]} (highlighted by a "
        f"red box) or the {names[1]} (highlighted by a blue box)?"
    )
    reasoning = (
        f"red z{bins[0]} {names[0]} , blue z{bins[1]} {names[1]} , "
        f"so {BOX_NAMES[1 + near]} z{bins[near]} {names[near]}"
    )
    return Question("Depth", text, _order(names[near], names[1 - near], answer), answer, reasoning)


def distance(scenes: SceneBatch, row: int, answer: int) -> Question:
    """Ask which of the objects in the blue and the green box is closer to the red box's."""
    slots = tuple(_boxed(scenes, row, box) for box in (1, 2, 3))
    names = _names(scenes, row, slots)
    gaps = gaps_from_red(scenes, row)
    bins = distance_bin(gaps)
    near = int(gaps[1] < gaps[0])
    text = (
        "Estimate the real-world distances between objects in this image. Which object is closer "
        f"to the {names[0]} (highlighted by a red box), the {names[1]} (highlighted by a blue box) "
        f"or the {names[2]} (highlighted by a green box)?"
    )
    told = [f"d{bins[0]} {names[1]}", f"d{bins[1]} {names[2]}"]
    seen = [_place(scenes, row, "red", slots[0], None)]
    for i in (0, 1):
        place = _place(scenes, row, BOX_NAMES[2 + i], slots[1 + i], slots[0])
        seen.append(f"{place} {told[i]}")
    name, other = names[1 + near], names[2 - near]
    reasoning = " , ".join([*seen, f"so {BOX_NAMES[2 + near]} {told[near]}"])
    return Question("Distance", text, _order(name, other, answer), answer, reasoning)


def nearer_box(scenes: SceneBatch, row: int) -> int:
    """Return 0 if the object in the red box is nearer to the camera, 1 if the blue box's is."""
    return int(scenes.z[row, _boxed(scenes, row, 2)] < scenes.z[row, _boxed(scenes, row, 1)])


def gaps_from_red(scenes: SceneBatch, row: int) -> np.ndarray:
    """Return the world distances of the blue and the green box's object from the red box's."""
    red, blue, green = (_boxed(scenes, row, box) for box in (1, 2, 3))
    return scenes.distance(np.array([row, row]), np.array([red, red]), np.array([blue, green]))


def count(
    scenes: SceneBatch, row: int, category: int, window: tuple[int, int], order: np.ndarray
) -> Question:
    """Ask how many objects of a category there are; options are `window`'s numbers in `order`."""
    category_name = category_plural(category)
    members = members_of(scenes, row, category)
    cells = sorted((scenes.cell_y[row, k], scenes.cell_x[row, k]) for k in members)
    numbers = [window[0] + int(i) for i in order]
    answer = numbers.index(len(members))
    singular = category_name.split()[0]
    if category < len(SHAPES):
        singular = SHAPES[category]
    places = [f"{singular} y{y} x{x}" for y, x in cells] or [f"{singular} none"]
    reasoning = f"{' , '.join(places)} , so {len(members)}"
    text = f"How many {category_name} are in the image?"
    return Question("Count", text, tuple(map(str, numbers)), answer, reasoning)


def category_plural(category: int) -> str:
    """Return the name of a category (see SceneBatch.target): "balls", "yellow objects"."""
    if category < len(SHAPES):
        return PLURALS[SHAPES[category]]
    return f"{COLOR_NAMES[category - len(SHAPES)]} objects"


def members_of(scenes: SceneBatch, row: int, category: int) -> np.ndarray:
    """Return the slots of the objects that belong to the category."""
    if category < len(SHAPES):
        match = scenes.shape[row] == category
    else:
        match = scenes.color[row] == category - len(SHAPES)
    return np.flatnonzero(match & scenes.exists[row])


def comparable(scenes: SceneBatch, row: int, difficulty: Difficulty) -> dict[str, bool]:
    """Say which questions about the boxed objects have a clear answer in this scene."""
    slots = {box: int(k) for k, box in enumerate(scenes.box[row]) if box > 0}
    out = {"left/right": False, "above/below": False, "Depth": False, "Distance": False}
    if not {1, 2} <= slots.keys():
        return out
    red, blue = slots[1], slots[2]
    cells = {"left/right": (scenes.cell_x, scenes.x), "above/below": (scenes.cell_y, scenes.y)}
    for name, (cell, value) in cells.items():
        gap = abs(value[row, red] - value[row, blue]) * NUM_CELLS
        out[name] = bool(gap >= difficulty.relation_cells and cell[row, red] != cell[row, blue])
    if scenes.solid[row]:
        out["Depth"] = _ratio(scenes.z[row, red], scenes.z[row, blue]) >= difficulty.depth_ratio
    if scenes.solid[row] and 3 in slots:
        out["Distance"] = _ratio(*gaps_from_red(scenes, row)) >= difficulty.distance_ratio
    return out


def caption(scenes: SceneBatch, row: int) -> str:
    """Describe every object in reading order: "see y5 x3 yellow ball z4 red box , ..."."""
    slots = [int(k) for k in np.flatnonzero(scenes.exists[row])]
    slots.sort(key=lambda k: (scenes.cell_y[row, k], scenes.cell_x[row, k]))
    return "see " + (" , ".join(describe(scenes, row, k) for k in slots) or "nothing")


def referring(scenes: SceneBatch, row: int, rng: np.random.Generator) -> tuple[str, str] | None:
    """Return a request to describe some objects by a word that only they have, and a reply.

    None if no word names a single object.
    """
    words: dict[str, list[int]] = {}
    for slot in map(int, np.flatnonzero(scenes.exists[row])):
        own = [COLOR_NAMES[scenes.color[row, slot]], SHAPES[scenes.shape[row, slot]]]
        for word in [*own, BOX_NAMES[scenes.box[row, slot]]]:
            words.setdefault(word, []).append(slot)
    named = {word: slots[0] for word, slots in words.items() if word and len(slots) == 1}
    if not named:
        return None
    chosen = [sorted(named)[i] for i in rng.permutation(len(named))[:REFERRED]]
    told = " , ".join(f"{word} {describe(scenes, row, named[word])}" for word in chosen)
    return f"Describe {' , '.join(chosen)} in the image.", f"see {told}"


def describe(scenes: SceneBatch, row: int, slot: int) -> str:
    """Describe one object: cell, colour, shape, depth (in solid scenes) and box."""
    words = [f"y{scenes.cell_y[row, slot]}", f"x{scenes.cell_x[row, slot]}"]
    words += [COLOR_NAMES[scenes.color[row, slot]], SHAPES[scenes.shape[row, slot]]]
    if scenes.solid[row]:
        words.append(f"z{scenes.depth_bin[row, slot]}")
    box = scenes.box[row, slot]
    return " ".join([*words, f"{BOX_NAMES[box]} box"] if box else words)


def _place(scenes: SceneBatch, row: int, box: str, slot: int, seen_from: int | None) -> str:
    """Tell where a boxed object is, and how far from another one along each axis."""
    words = []
    for axis, bins in zip("xyz", (scenes.cell_x, scenes.cell_y, scenes.depth_bin), strict=True):
        here = int(bins[row, slot])
        words.append(f"{box} {axis}{here}")
        if seen_from is not None:
            words.append(f"d{axis}{abs(here - int(bins[row, seen_from]))}")
    return " ".join(words)


def _boxed(scenes: SceneBatch, row: int, box: int) -> int:
    return int(np.flatnonzero(scenes.box[row] == box)[0])


def _names(scenes: SceneBatch, row: int, slots: tuple[int, ...]) -> list[str]:
    return [SHAPES[scenes.shape[row, slot]] for slot in slots]


def _order(truth: str, other: str, answer: int) -> tuple[str, str]:
    return (truth, other) if answer == 0 else (other, truth)


def _ratio(a: float, b: float) -> float:
    return float(max(a, b) / min(a, b))
