"""Are questions in CV-Bench's form, their answers true, and their letters no help to the blind?"""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from data_recipes.scenes import questions as ask
from data_recipes.scenes.layout import Difficulty
from data_recipes.scenes.sets import benchmark_examples, training_examples
from data_recipes.scenes.vocabulary import SHAPES

SMALL = 16  # px: these tests do not look at the pictures


@pytest.fixture(scope="module")
def examples():
    return {task: list(benchmark_examples(task, 430, SMALL, 1, Difficulty())) for task in ask.TASKS}


def slot_of(example, box):
    return int(np.flatnonzero(example.scenes.box[example.row] == box)[0])


def value(example, name, box):
    return getattr(example.scenes, name)[example.row, slot_of(example, box)]


def test_prompt_is_cv_bench_s_to_the_byte():
    question = ask.Question("Count", "How many organs are in the image?", ("3", "2"), 1, "")
    assert question.prompt == (
        "How many organs are in the image? Select from the following choices.\n(A) 3\n(B) 2"
    )
    assert question.letter == "(B)"


def test_relation_answers_follow_from_the_positions(examples):
    for example in examples["Relation"]:
        (question,) = example.questions
        vertical = set(question.choices) == {"above", "below"}
        axis = "y" if vertical else "x"
        less = value(example, axis, 1) < value(example, axis, 2)
        truth = {True: ("above", "left"), False: ("below", "right")}[bool(less)][not vertical]
        assert question.choices[question.answer] == truth


def test_depth_answers_name_the_nearer_object(examples):
    for example in examples["Depth"]:
        (question,) = example.questions
        near = 1 if value(example, "z", 1) < value(example, "z", 2) else 2
        assert question.choices[question.answer] == SHAPES[value(example, "shape", near)]
        ratio = value(example, "z", 1) / value(example, "z", 2)
        assert max(ratio, 1 / ratio) >= Difficulty().depth_ratio


def test_distance_answers_name_the_object_closer_to_the_red_box(examples):
    for example in examples["Distance"]:
        (question,) = example.questions
        points = {}
        for box in (1, 2, 3):
            z = value(example, "z", box)
            x, y = value(example, "x", box) - 0.5, value(example, "y", box) - 0.3
            points[box] = np.array([x * z / 0.7, y * z / 0.7, z])
        gaps = {box: np.linalg.norm(points[box] - points[1]) for box in (2, 3)}
        near = min(gaps, key=gaps.__getitem__)
        assert question.choices[question.answer] == SHAPES[value(example, "shape", near)]


def test_counts_are_counted_again_from_the_scene(examples):
    for example in examples["Count"]:
        (question,) = example.questions
        name = re.fullmatch(r"How many (.+) are in the image\?", question.text)[1]
        scenes, row = example.scenes, example.row
        total = 0
        for slot in np.flatnonzero(scenes.exists[row]):
            words = ask.describe(scenes, row, slot).split()
            color, shape = words[2:4]
            total += name in (f"{color} objects", ask.PLURALS[shape])
        assert question.choices[question.answer] == str(total)


def test_replies_end_with_the_letter_and_write_out_what_is_seen(examples):
    for task, found in examples.items():
        for example in found:
            (question,) = example.questions
            assert question.reply.endswith(f" {question.letter}")
            assert " , so " in question.reply, task


@pytest.mark.parametrize("task", ask.TASKS)
def test_letters_are_exactly_balanced(examples, task):
    by_options = defaultdict(Counter)
    for example in examples[task]:
        (question,) = example.questions
        by_options[len(question.choices)][question.letter] += 1
    for options, letters in by_options.items():
        assert len(letters) == options
        if task == "Count" and options == 5:  # 10 a stratum, 5 letters: equal as well
            assert len(set(letters.values())) == 1
        assert max(letters.values()) - min(letters.values()) <= (1 if task != "Count" else 6)


def test_within_a_window_every_count_is_equally_likely(examples):
    windows = defaultdict(Counter)
    for example in examples["Count"]:
        (question,) = example.questions
        windows[frozenset(question.choices)][question.choices[question.answer]] += 1
    for window, counts in windows.items():
        assert set(counts) == window
        assert len(set(counts.values())) == 1


@pytest.mark.parametrize("task", ["Relation", "Depth", "Distance"])
def test_who_knows_the_wording_alone_stays_at_chance(task):
    """Guess the answer seen most often with the same names; test on other scenes."""

    def rows(seed):
        for example in benchmark_examples(task, 600, SMALL, seed, Difficulty()):
            (question,) = example.questions
            yield question, question.choices[question.answer]

    seen = defaultdict(Counter)
    for question, truth in rows(1):
        seen[question.text][truth] += 1
    hits = [seen[q.text].most_common(1)[0][0] == truth for q, truth in rows(2) if seen.get(q.text)]
    chance, n = 0.5, len(hits)
    assert n > 300
    if task == "Relation":  # the wording does not say the axis; of four words two are options
        assert np.mean(hits) <= 0.5 + 3 * (0.25 / n) ** 0.5
    else:
        assert abs(np.mean(hits) - chance) <= 3 * (0.25 / n) ** 0.5


def test_training_dialogues_hold_all_tasks_and_true_captions():
    tasks = Counter()
    for example in training_examples(120, None, 0, Difficulty()):
        tasks.update(question.task for question in example.questions)
        caption = ask.caption(example.scenes, example.row)
        assert caption.count(" , ") + 1 == max(1, example.scenes.exists[example.row].sum())
        boxes = np.flatnonzero(example.scenes.box[example.row])
        assert len(re.findall(r"\b(?:red|blue|green) box\b", caption)) == len(boxes)
    assert set(tasks) == set(ask.TASKS)
