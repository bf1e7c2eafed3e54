"""What does the base language model read? Questions and captions about scenes told in words.

Every document is one turn in the `chatml` template, of one of two kinds:

- a reply whose observations are given: the model learns what follows from them (the comparison, the
  name or number, the letter);
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
from data_recipes.scenes.sets import training_examples
from data_recipes.scenes.vocabulary import NUM_CELLS

# Closer calls than the benchmark's, so that the comparison itself is learnt.
DIFFICULTY = Difficulty(solid_share=1.0, depth_ratio=1.15, distance_ratio=1.2)
KINDS = (*ask.TASKS, *(f"{task} told" for task in (*ask.TASKS, "Caption", "Referring")))
FLAT_EVERY = 5  # one scene in so many is flat, for its shapes' names


@dataclass(frozen=True)
class Document:
    """One turn; `given` is the part of the reply that is not learnt, `cells` the scene's bags."""

    task: str
    prompt: str
    given: str
    learnt: str
    cells: list[list[str]]

    @property
    def kind(self) -> str:
        """The task, followed by "told" where a scene is told and the whole reply is learnt."""
        return f"{self.task} told" if self.cells else self.task


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
            yield Document("Caption", ask.CAPTION_PROMPT, "", ask.caption(scenes, row), cells)
            referring = ask.referring(scenes, row, rng)
            if referring is not None:
                yield Document("Referring", referring[0], "", referring[1], cells)
            for question in example.questions:
                given, learnt = split_reply(question)
                yield Document(question.task, question.prompt, given, learnt, [])
                yield Document(question.task, question.prompt, "", question.reply, cells)


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


def split_reply(question: ask.Question) -> tuple[str, str]:
    """Cut a reply where seeing ends and reasoning begins.

    Distances follow from positions, so they are learnt too; otherwise reasoning begins at "so".
    """
    reply = question.reply
    if question.task == "Distance":
        second_blue = list(re.finditer(r" , blue", reply))[1]
        cut = second_blue.start() + len(" ,")
    else:
        cut = reply.index(" , so") + len(" ,")
    return reply[:cut], reply[cut:]
