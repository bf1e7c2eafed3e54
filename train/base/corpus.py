"""What does the base language model read? Questions and captions about scenes told in words.

Every document is one turn in the `chatml` template, of one of four kinds:

- a reply whose observations are given: the model learns what follows from them (the comparison, the
  name or number, the letter);
- comparisons of two distances, many in a row: in a question about distances one word depends on the
  comparison, too little to be learnt from every time;
- differences of two positions, many in a row, as a question about distances writes six of;
- a scene and a whole reply. The scene is told cell by cell, each cell's words ("yellow", "ball",
  "x3", "y5", "z4") laid over each other at one position, as a bag of words: the model learns to
  look things up among the cells. Empty cells say where they are and nothing else.

No document holds a picture. Reading bags of words is the skill that the connector's tokens can use
later: stage 1 has to find these words for what the encoder sees.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from data_recipes.scenes import questions as ask
from data_recipes.scenes.layout import Difficulty, SceneBatch
from data_recipes.scenes.sets import assign_boxes, training_examples
from data_recipes.scenes.vocabulary import (
    BOX_NAMES,
    NUM_CELLS,
    NUM_DEPTH_BINS,
    NUM_DISTANCE_BINS,
    SHAPES,
)

# Closer calls than the benchmark's, so that the comparison itself is learnt.
DIFFICULTY = Difficulty(solid_share=1.0, depth_ratio=1.15, distance_ratio=1.2)
COMPARE, COMPARE_PROMPT = "Compare", "Which distance is smaller?"
DIFFER, DIFFER_PROMPT = "Differ", "How far apart are these along each axis?"
KINDS = (
    *ask.TASKS,
    COMPARE,
    DIFFER,
    *(f"{task} told" for task in (*ask.TASKS, "Caption", "Referring")),
)
FLAT_EVERY = 5  # one scene in so many is flat, for its shapes' names
# Distances are rare among a scene's questions and take the most learning (two numbers' difference,
# axis by axis), so boxes are drawn anew this often in each solid scene to ask for more of them.
MORE_DISTANCES = 2
COMPARISONS = 8  # in one document
DIFFERENCES = 4  # objects that differ from the red box's in one document, along three axes each
SEEN_IN_DISTANCE = re.compile(r"^see[^,]*,| (?:blue|green) [xyz]\d")


@dataclass(frozen=True)
class Document:
    """One turn: a prompt and the pieces of its reply, each with whether it is learnt.

    `cells` are the bags of words that tell a scene.
    """

    task: str
    prompt: str
    reply: tuple[tuple[str, bool], ...]
    cells: list[list[str]]

    @property
    def kind(self) -> str:
        """The task, followed by "told" where a scene is told and the whole reply is learnt."""
        return f"{self.task} told" if self.cells else self.task

    @property
    def text(self) -> str:
        """The whole reply."""
        return "".join(piece for piece, _ in self.reply)


def documents(seed: int, num_scenes: int, most_empty: int) -> Iterator[Document]:
    """Yield the documents of `num_scenes` random scenes: every question in both kinds.

    Args:
        seed: decides the scenes.
        num_scenes: how many.
        most_empty: empty cells told of a scene, at most; 64 allows the whole grid.
    """
    rng = np.random.default_rng([seed, 0])
    flat = replace(DIFFICULTY, solid_share=0.0)
    share = max(1, num_scenes // FLAT_EVERY)
    for number, difficulty in ((num_scenes - share, DIFFICULTY), (share, flat)):
        for example in training_examples(number, None, seed, difficulty):
            scenes, row = example.scenes, example.row
            cells = tell_cells(scenes, row, int(rng.integers(most_empty + 1)), rng)
            yield comparisons(rng)
            yield differences(rng)
            yield _told("Caption", ask.CAPTION_PROMPT, ask.caption(scenes, row), cells)
            referring = ask.referring(scenes, row, rng)
            if referring is not None:
                yield _told("Referring", *referring, cells)
            for question in example.questions:
                yield from _both_kinds(question, cells)
            if scenes.solid[row]:
                for boxed, question in _more_distances(scenes, row, rng):
                    empty = int(rng.integers(most_empty + 1))
                    yield from _both_kinds(question, tell_cells(boxed, 0, empty, rng))


def comparisons(rng: np.random.Generator) -> Document:
    """Return a document that says, pair by pair of given distances, which is smaller."""
    pieces: list[tuple[str, bool]] = []
    for _ in range(COMPARISONS):
        bins = rng.choice(NUM_DISTANCE_BINS, 2, replace=False)
        names = rng.choice(SHAPES, 2)
        told = [f"{BOX_NAMES[2 + i]} d{bins[i]} {names[i]}" for i in (0, 1)]
        pieces.append((f" {told[0]} , {told[1]} , so", False))
        pieces.append((f" {told[int(bins.argmin())]} ,", True))
    return Document(COMPARE, COMPARE_PROMPT, tuple(pieces), [])


def differences(rng: np.random.Generator) -> Document:
    """Return a document that says how far given positions are from the red box's, axis by axis.

    Written as a reply about distances writes them, see `questions.distance`.
    """
    sides = {"x": NUM_CELLS, "y": NUM_CELLS, "z": NUM_DEPTH_BINS}
    red = {axis: int(rng.integers(size)) for axis, size in sides.items()}
    pieces = [("see" + "".join(f" red {axis}{value}" for axis, value in red.items()), False)]
    for number in range(DIFFERENCES):
        gap = " ,"
        for axis, size in sides.items():
            value = int(rng.integers(size))
            pieces.append((f"{gap} {BOX_NAMES[2 + number % 2]} {axis}{value}", False))
            pieces.append((f" d{axis}{abs(value - red[axis])}", True))
            gap = ""
    return Document(DIFFER, DIFFER_PROMPT, tuple(pieces), [])


def _told(task: str, prompt: str, reply: str, cells: list[list[str]]) -> Document:
    return Document(task, prompt, ((reply, True),), cells)


def _both_kinds(question: ask.Question, cells: list[list[str]]) -> Iterator[Document]:
    yield Document(question.task, question.prompt, split_reply(question), [])
    yield _told(question.task, question.prompt, question.reply, cells)


def _more_distances(
    scenes: SceneBatch, row: int, rng: np.random.Generator
) -> Iterator[tuple[SceneBatch, ask.Question]]:
    """Yield the scene with other boxes and the question about their distances, where clear."""
    for _ in range(MORE_DISTANCES):
        boxed = scenes.select(np.array([row]))
        assign_boxes(boxed, np.array([3]), rng)
        if ask.comparable(boxed, 0, DIFFICULTY)["Distance"]:
            yield boxed, ask.distance(boxed, 0, int(rng.integers(2)))


def tell_cells(
    scenes: SceneBatch, row: int, empty: int, rng: np.random.Generator
) -> list[list[str]]:
    """Return the words of cells in reading order: all with an object and up to `empty` others."""
    objects = {}
    for slot in map(int, np.flatnonzero(scenes.exists[row])):
        words = ask.describe(scenes, row, slot).split()
        place = (int(scenes.cell_y[row, slot]), int(scenes.cell_x[row, slot]))
        objects[place] = [word for word in words if word != "box"]
    places = [divmod(int(i), NUM_CELLS) for i in rng.permutation(NUM_CELLS**2)]
    others = [place for place in places if place not in objects][:empty]
    for y, x in others:
        objects[y, x] = [f"x{x}", f"y{y}"]
    return [objects[place] for place in sorted(objects)]


def split_reply(question: ask.Question) -> tuple[tuple[str, bool], ...]:
    """Cut a reply into pieces that are seen (False) and pieces that follow from them (True).

    Distances follow from positions, so they are learnt; otherwise reasoning begins at "so".
    """
    reply = question.reply
    if question.task != "Distance":
        cut = reply.index(" , so") + len(" ,")
        return ((reply[:cut], False), (reply[cut:], True))
    pieces, at = [], 0
    for match in SEEN_IN_DISTANCE.finditer(reply):
        pieces += [(reply[at : match.start()], True), (match[0], False)]
        at = match.end()
    pieces.append((reply[at:], True))
    return tuple(piece for piece in pieces if piece[0])
