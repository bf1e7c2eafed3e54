"""Are moving scenes what their questions say, balanced, and silent in their first frame?"""

import re
from collections import Counter

import numpy as np
import pytest

from data_recipes.records import to_messages
from data_recipes.scenes import moving_questions as ask
from data_recipes.scenes.moving import (
    DIRECTIONS,
    NUM_FRAMES,
    STEPS,
    TRAVEL,
    render_clips,
    sample_moving,
)
from data_recipes.scenes.moving_build import (
    SETS,
    MovingSettings,
    _test_shard,
    _train_shard,
    benchmark,
)
from vlm.answers import read_answer
from vlm.video import sample_video


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return sample_moving(rng, np.arange(80) % 4, np.arange(80) // 4 % 4)


def test_the_mover_moves_and_others_come(batch):
    first, last = batch.at(0), batch.at(NUM_FRAMES - 1)
    moved = np.stack([last.x - first.x, last.y - first.y], axis=-1)
    np.testing.assert_allclose(moved[:, 0], TRAVEL * STEPS[batch.direction])
    assert not moved[:, 1:].any()
    assert (last.exists.sum(1) - first.exists.sum(1) == np.arange(80) // 4 % 4).all()
    for row in range(len(batch)):
        names = [ask.name(batch, row, k) for k in np.flatnonzero(last.exists[row])]
        assert len(set(names)) == len(names)
        times = [batch.appears[row, k] for k in batch.slots(row, appearing=True)]
        assert times == sorted(set(times)) and all(0 < time < NUM_FRAMES for time in times)


def test_the_first_frame_says_nothing():
    """Nobody can tell the mover by where it stands, how large it is, or how many there are."""
    rng = np.random.default_rng(0)
    batch = sample_moving(rng, np.arange(800) % 4, np.arange(800) // 4 % 4)
    scenes = batch.scenes
    standing = scenes.exists & (batch.appears == 0)
    for values in (scenes.x, scenes.y, scenes.radius):
        mover, others = values[:, 0], values[:, 1:][standing[:, 1:]]
        assert abs(mover.mean() - others.mean()) < 4 * values[standing].std() / 800**0.5
        assert abs(mover.std() / others.std() - 1) < 0.15
    for axis in (scenes.x, scenes.y):
        assert (axis[standing] - TRAVEL > 0).all() and (axis[standing] + TRAVEL < 1).all()
    counts = standing.sum(1)
    for number in range(4):
        of = counts[np.arange(800) // 4 % 4 == number]
        assert abs(of.mean() - 3.5) < 4 * 0.5 / 200**0.5  # 3 or 4, whatever appears


def test_pictures_show_what_is_told(batch):
    clips = render_clips(batch, 32, seed=1, noise=0.02)
    assert clips.shape == (80, NUM_FRAMES, 32, 32, 3)
    for row in range(8):
        seen = [(clips[row, t] != clips[row, t - 1]).any() for t in range(1, NUM_FRAMES)]
        assert all(seen)  # something moves
        slots = batch.slots(row, appearing=True)
        for k in slots:
            at = (int(batch.scenes.y[row, k] * 32), int(batch.scenes.x[row, k] * 32))
            time = batch.appears[row, k]
            before, after = (clips[row, t][at].astype(int) for t in (time - 1, time))
            assert abs(after - before).max() > 20


@pytest.mark.parametrize("task", ask.TASKS)
def test_truths_and_letters_are_balanced(task):
    choices = ask.NUM_CHOICES[task]
    found = Counter()
    for _, clips, questions in benchmark(task, 3 * choices**2, seed=0):
        for row, question in enumerate(questions):
            truth = question.choices[question.answer]
            assert len(set(question.choices)) == choices
            if task == "Direction":
                assert truth == DIRECTIONS[clips.direction[row]]
            if task == "Appear":
                assert int(truth) == len(clips.slots(row, appearing=True))
            if task == "Mover":
                assert truth == ask.name(clips, row, 0)
            if task == "First":
                assert truth == ask.name(clips, row, clips.slots(row, appearing=True)[0])
            assert question.reply.endswith(f" {truth} {question.letter}")
            assert read_answer(question.reply, question.choices).letter == question.letter[1]
            found[truth if task in ("Direction", "Appear") else None, question.letter] += 1
    assert len(set(found.values())) == 1
    assert len(found) == choices**2 if task in ("Direction", "Appear") else choices


def test_conclusions_follow_from_what_is_seen(batch):
    rng = np.random.default_rng(0)
    ways = {(0, 0): "none", **dict(zip(map(tuple, STEPS), DIRECTIONS, strict=True))}
    path = re.compile(r"(\w+ \w+) y(\d) x(\d) , y(\d) x(\d) (\w+)")
    for row in range(len(batch)):
        seen, went = ask.ask("Mover", batch, row, 1, rng).reasoning.split(" , so ")
        found = {}
        for name, *cells, way in path.findall(seen):
            y, x, later_y, later_x = map(int, cells)
            assert way == ways[np.sign(later_x - x), np.sign(later_y - y)]
            found[way] = name
        way = DIRECTIONS[batch.direction[row]]
        assert set(found) == {"none", way} and went == f"{way} {found[way]}"
        seen, number = ask.ask("Appear", batch, row, 2, rng).reasoning.split(" , so ")
        told = seen.split(" , ")
        cells = [each[:5] for each in told]
        assert cells == sorted(cells) and len(told) == batch.scenes.exists[row].sum()
        newcomers = [int(each.split()[-1]) for each in told if each[-2] != "x"]
        assert newcomers == list(range(1, int(number) + 1))
        if int(number) > 1:
            seen, first = ask.ask("First", batch, row, 0, rng).reasoning.split(" , so ")
            parts = {each.split()[-1]: " ".join(each.split()[:2]) for each in seen.split(" , ")}
            assert first == f"{min(parts)} {parts[min(parts)]}" and len(parts) == 2


def test_files(tmp_path):
    for folder in ("train/videos", *SETS):
        (tmp_path / folder).mkdir(parents=True)
    settings = MovingSettings(train=3, test_per_task=4, size=32)
    lines = _train_shard((tmp_path, settings, 0))
    assert len(lines) == 6 and lines == _train_shard((tmp_path, settings, 0))
    import json

    for line in lines:
        record = to_messages(json.loads(line), "f:1")
        clip = sample_video(tmp_path / "train" / record.videos[0])
        assert (len(clip.frames), clip.frames[0].size, clip.duration) == (NUM_FRAMES, (32, 32), 2)
    rows = _test_shard((tmp_path, settings, "First"))
    assert [row["answer"] for row in rows] == ["(A)", "(B)", "(A)", "(B)"]
    moving = sample_video(tmp_path / "test" / rows[0]["video"]).frames
    for folder, end in (("first_frame", 0), ("last_frame", -1)):
        frozen = sample_video(tmp_path / folder / rows[0]["video"]).frames
        other = moving[-1 - end]
        drift = [np.abs(np.subtract(f, moving[end], dtype=int)).max() for f in (*frozen, other)]
        assert max(drift[:-1]) < 30 < drift[-1]  # MP4 is not quite lossless
