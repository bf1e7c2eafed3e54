"""What does the base language model read? Questions with the observations already written out.

Two kinds of documents, both as conversations in the `chatml` template:

- a question, and a reply whose observations are given: the model learns what follows from them (the
  comparison, the name or number, the letter), never what a picture might have shown;
- a scene told object by object in random order, and its caption in reading order.

No document holds a picture, so whatever the stages add is what they learn about pictures.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_recipes.scenes import questions as ask
from data_recipes.scenes.layout import Difficulty
from data_recipes.scenes.sets import training_examples

CAPTION_PROMPT = "Describe the image."
# Closer calls than the benchmark's, so that the comparison itself is learnt.
DIFFICULTY = Difficulty(solid_share=1.0, depth_ratio=1.15, distance_ratio=1.2)
FLAT_EVERY = 5  # one scene in so many is flat, for its shapes' names


@dataclass(frozen=True)
class Document:
    """One conversation turn; `given` is the part of the reply that is not learnt."""

    task: str
    prompt: str
    given: str
    learnt: str


def documents(seed: int, num_scenes: int) -> Iterator[Document]:
    """Yield the documents of `num_scenes` random scenes."""
    rng = np.random.default_rng([seed, 0])
    flat = Difficulty(solid_share=0.0)
    share = max(1, num_scenes // FLAT_EVERY)
    for number, difficulty in ((num_scenes - share, DIFFICULTY), (share, flat)):
        for example in training_examples(number, None, seed, difficulty):
            scenes, row = example.scenes, example.row
            slots = rng.permutation(np.flatnonzero(scenes.exists[row]))
            told = " , ".join(ask.describe(scenes, row, k) for k in slots) or "nothing"
            caption = ask.caption(scenes, row)
            yield Document("Caption", f"{told}\n{CAPTION_PROMPT}", "", caption)
            for question in example.questions:
                given, learnt = split_reply(question)
                yield Document(question.task, question.prompt, given, learnt)


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
