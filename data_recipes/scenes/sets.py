"""Which scenes and questions make a training set or a benchmark? Streams of both, by seed.

A benchmark is balanced by construction: it is filled stratum by stratum (what is true x which
letter says so), so neither the letter nor, for counts, the number can be guessed from the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from data_recipes.scenes import questions as ask
from data_recipes.scenes.layout import Difficulty, SceneBatch, sample_scenes
from data_recipes.scenes.questions import COUNT_WINDOWS, Question
from data_recipes.scenes.render import render
from data_recipes.scenes.vocabulary import COLOR_NAMES, FLAT_SHAPES, SHAPES
from vlm.errors import UserError

BATCH = 256
MOST_FRUITLESS = 40  # batches without a new benchmark scene before we give up
BOX_COUNTS = ((0, 0.1), (2, 0.2), (3, 0.7))  # boxes in a training scene, and how often


@dataclass(frozen=True)
class Example:
    """One scene: its picture (P, P, 3) uint8 or None, what is in it, what is asked."""

    picture: np.ndarray | None
    scenes: SceneBatch
    row: int
    questions: list[Question]


def assign_boxes(scenes: SceneBatch, counts: np.ndarray, rng: np.random.Generator) -> None:
    """Put boxes 1..count around objects of different shapes, chosen at random.

    A scene without two objects of different shapes gets no box.
    """
    for row, wanted in enumerate(counts):
        chosen: list[int] = []
        for slot in rng.permutation(np.flatnonzero(scenes.exists[row])):
            taken = {scenes.shape[row, other] for other in chosen}
            if len(chosen) < wanted and scenes.shape[row, slot] not in taken:
                chosen.append(int(slot))
        scenes.box[row] = 0
        if len(chosen) > 1:
            scenes.box[row, chosen] = np.arange(1, len(chosen) + 1)


def assign_random_boxes(scenes: SceneBatch, rng: np.random.Generator) -> None:
    """Put as many boxes into each scene as training scenes have, see `BOX_COUNTS`."""
    values, shares = zip(*BOX_COUNTS, strict=True)
    assign_boxes(scenes, rng.choice(values, len(scenes), p=shares), rng)


def training_examples(
    num: int, size: int | None, seed: int, difficulty: Difficulty
) -> Iterator[Example]:
    """Yield `num` scenes with every question that has a clear answer, in random order.

    `size` is the side of the pictures in pixels; None renders none (text alone).
    """
    rng = np.random.default_rng(seed)
    for start in range(0, num, BATCH):
        scenes = sample_scenes(rng, min(BATCH, num - start), difficulty)
        assign_random_boxes(scenes, rng)
        pictures = None
        if size is not None:
            pictures = render(scenes, size, rng, difficulty.noise)[0]
        for row in range(len(scenes)):
            picture = None if pictures is None else pictures[row]
            yield Example(picture, scenes, row, _all_questions(scenes, row, rng, difficulty))


def _all_questions(
    scenes: SceneBatch, row: int, rng: np.random.Generator, difficulty: Difficulty
) -> list[Question]:
    clear = ask.comparable(scenes, row, difficulty)
    flips = rng.integers(0, 2, 4)
    found = []
    if clear["left/right"]:
        found.append(ask.relation(scenes, row, False, flips[0]))
    if clear["above/below"]:
        found.append(ask.relation(scenes, row, True, flips[1]))
    if clear["Depth"]:
        found.append(ask.depth(scenes, row, flips[2]))
    if clear["Distance"]:
        found.append(ask.distance(scenes, row, flips[3]))
    categories = {int(scenes.target[row])}
    if len(found) < 3:
        categories.add(_random_category(scenes, row, rng))
    found += [_count(scenes, row, category, rng) for category in sorted(categories)]
    return [found[i] for i in rng.permutation(len(found))]


def _random_category(scenes: SceneBatch, row: int, rng: np.random.Generator) -> int:
    if rng.random() < 0.5:
        return len(SHAPES) + int(rng.integers(len(COLOR_NAMES)))
    first = len(FLAT_SHAPES) if scenes.solid[row] else 0
    return first + int(rng.integers(len(FLAT_SHAPES)))


def _count(scenes: SceneBatch, row: int, category: int, rng: np.random.Generator) -> Question:
    truth = len(ask.members_of(scenes, row, category))
    fitting = [w for w in COUNT_WINDOWS if w[0] <= truth < sum(w)] or [(truth - 3, 4)]
    window = fitting[rng.integers(len(fitting))]
    return ask.count(scenes, row, category, window, rng.permutation(window[1]))


def benchmark_examples(
    task: str, num: int, size: int, seed: int, difficulty: Difficulty
) -> Iterator[Example]:
    """Yield at least `num` scenes with one question of `task` each, every stratum equally often."""
    rng = np.random.default_rng([seed, ask.TASKS.index(task)])
    strata = _strata(task)
    per_stratum = -(-num // len(strata))
    open_strata = {stratum: per_stratum for stratum in strata}
    boxes = {"Relation": 2, "Depth": 2, "Distance": 3, "Count": 0}[task]
    if task in ("Depth", "Distance"):
        difficulty = replace(difficulty, solid_share=1.0)
    fruitless = 0
    while open_strata:
        if fruitless == MOST_FRUITLESS:
            raise UserError(
                f"scenes: {BATCH * fruitless} scenes in a row fit no open case of {task}, such as "
                f"{next(iter(open_strata))}; make the difficulty knobs less strict"
            )
        scenes = sample_scenes(rng, BATCH, difficulty)
        assign_boxes(scenes, np.full(len(scenes), boxes), rng)
        taken: list[tuple[int, Question]] = []
        for row in range(len(scenes)):
            stratum = _pick_stratum(task, scenes, row, open_strata, difficulty, rng)
            if stratum is not None:
                turn = per_stratum - open_strata[stratum]
                taken.append((row, _ask_stratum(task, scenes, row, stratum, turn, rng)))
                open_strata[stratum] -= 1
                if open_strata[stratum] == 0:
                    del open_strata[stratum]
        fruitless = 0 if taken else fruitless + 1
        chosen = scenes.select(np.array([row for row, _ in taken], dtype=int))
        pictures = render(chosen, size, rng, difficulty.noise)[0]
        for i, (_, question) in enumerate(taken):
            yield Example(pictures[i], chosen, i, [question])


def _strata(task: str) -> list[tuple]:
    if task == "Relation":
        return list(product(("left", "right", "above", "below"), (0, 1)))
    if task == "Count":
        return [(w, w[0] + i) for w in COUNT_WINDOWS for i in range(w[1])]
    return list(product(("first", "second"), (0, 1)))


def _pick_stratum(
    task: str,
    scenes: SceneBatch,
    row: int,
    open_strata: dict[tuple, int],
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> tuple | None:
    """Return an open stratum that this scene can fill, or None."""
    if task == "Count":
        truth = len(ask.members_of(scenes, row, int(scenes.target[row])))
        fitting = [stratum for stratum in open_strata if stratum[1] == truth]
    else:
        truths = _truths(task, scenes, row, difficulty)
        fitting = [stratum for stratum in open_strata if stratum[0] in truths]
    return fitting[rng.integers(len(fitting))] if fitting else None


def _truths(task: str, scenes: SceneBatch, row: int, difficulty: Difficulty) -> set[str]:
    """Return what could be asked of this scene: which statements would be the right option."""
    clear = ask.comparable(scenes, row, difficulty)
    if task == "Relation":
        words = {"left/right": ("left", "right"), "above/below": ("above", "below")}
        kinds = [kind for kind in words if clear[kind]]
        return {_relation_truth(scenes, row, kind == "above/below") for kind in kinds}
    if not clear[task]:
        return set()
    if task == "Depth":
        return {("first", "second")[ask.nearer_box(scenes, row)]}
    gaps = ask.gaps_from_red(scenes, row)
    return {"first" if gaps[0] <= gaps[1] else "second"}


def _relation_truth(scenes: SceneBatch, row: int, vertical: bool) -> str:
    return ask.relation(scenes, row, vertical, 0).choices[0]


def _ask_stratum(
    task: str,
    scenes: SceneBatch,
    row: int,
    stratum: tuple,
    turn: int,
    rng: np.random.Generator,
) -> Question:
    if task == "Relation":
        return ask.relation(scenes, row, stratum[0] in ("above", "below"), stratum[1])
    if task == "Depth":
        return ask.depth(scenes, row, stratum[1])
    if task == "Distance":
        return ask.distance(scenes, row, stratum[1])
    window, truth = stratum
    order = rng.permutation(window[1])
    # The right number goes to each letter in turn; each number of a window starts elsewhere.
    place = (turn + truth) % window[1]
    at = int(np.flatnonzero(order == truth - window[0])[0])
    order[at], order[place] = order[place], order[at]
    return ask.count(scenes, row, int(scenes.target[row]), window, order)
