"""Are rows filled best, each record once an epoch, whatever the ranks and wherever killed?"""

import json

import numpy as np
import pytest

from train.callbacks import read_log
from train.order import PositionSampler, seen_spans
from train.pack_sampler import PackSampler
from train.packing import Packing, best_fit, take_apart
from train.steps import StepSizes
from train.trainer import VlmTrainer
from vlm.cli import main

LENGTHS = np.random.default_rng(0).integers(5, 60, 500)


@pytest.mark.parametrize(
    "lengths, most, rows",
    [
        ([5, 3, 4, 2, 6], 8, [[4, 3], [0, 1], [2]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([3, 7, 5], 8, [[1], [2, 0]]),  # the fullest row with room, not the first
        ([1, 5, 6], 8, [[2, 0], [1]]),
        ([9, 1], 8, [[0], [1]]),  # a longer one stays alone
        ([8, 0, 0], 8, [[0, 1, 2]]),
        ([], 8, []),
    ],
)
def test_best_fit(lengths, most, rows):
    assert best_fit(lengths, most) == rows


def test_best_fit_fills_rows():
    rows = best_fit(LENGTHS, 128)
    assert sorted(record for row in rows for record in row) == list(range(500))
    assert max(LENGTHS[row].sum() for row in rows) <= 128
    assert len(rows) <= LENGTHS.sum() / 128 * 1.02


@pytest.mark.parametrize(
    "packs, count, parts",
    [
        ([(0, 1), (2,)], 2, [(0, 1), (2,)]),
        ([(0, 1), (2,)], 3, [(0,), (1,), (2,)]),
        ([(0, 1, 2, 3, 4), (5, 6)], 4, [(0, 1), (2,), (3, 4), (5, 6)]),
    ],
)
def test_take_apart(packs, count, parts):
    assert take_apart(packs, count) == parts


def sampler(ranks=1, max_steps=0, epochs=3, accumulation=2, window=64, drop_last=False, size=500):
    """500 records of other lengths in each epoch, two packs a micro-batch on each rank."""

    def num_tokens(start, stop):
        return np.array([LENGTHS[(p * 7 + p // size * 31) % 500] for p in range(start, stop)])

    def sizes(packs):
        return StepSizes(packs, 2 * ranks, accumulation, drop_last)

    def total(plan):
        return max_steps or epochs * plan.steps

    wanted = max_steps * accumulation * 2 * ranks if max_steps else None
    packing = Packing(length=128, window=window)
    return PackSampler(size, num_tokens, packing, 0, sizes, total, wanted)


def epochs_of(order, count):
    found = []
    for epoch in range(count):
        order.set_epoch(epoch)
        found.append(list(order))
    return found


def test_every_record_once_in_each_of_equal_epochs():
    order = sampler()
    found = epochs_of(order, 3)
    for epoch, packs in enumerate(found):
        positions = sorted(position for pack in packs for position in pack)
        assert positions == list(range(500 * epoch, 500 * (epoch + 1)))
        assert len(packs) == len(order)
    assert len({len(list(order._windows(epoch))) for epoch in range(3)}) == 1
    planned = [sum(len(packs) for packs, _ in order._windows(epoch)) for epoch in range(3)]
    assert len(set(planned)) > 1  # some epochs took rows apart
    assert max(planned) == order.packs
    assert order.fill > 0.95


def test_ranks_share_the_same_packs():
    alone = epochs_of(sampler(), 2)
    for ranks in (2, 3):
        for one, several in zip(alone, epochs_of(sampler(ranks), 2), strict=True):
            assert len(several) % (2 * ranks) == 0
            assert [p for p in several if p] == [p for p in one if p]


def test_records_stay_within_their_window():
    seen = 0
    for packs, lengths in sampler()._windows(1):
        positions = [position for pack in packs for position in pack]
        assert sorted(positions) == list(range(500 + seen, 500 + seen + len(lengths)))
        assert positions != sorted(positions)
        seen += len(lengths)


def test_a_last_step_that_is_not_full_is_dropped_on_request():
    order, kept = sampler(ranks=3, drop_last=True), sampler(ranks=3)
    assert len(order) == order.packs == kept.packs < len(kept)
    assert () not in list(order)


def test_the_rest_of_an_epoch_that_is_never_seen_is_not_planned():
    order, whole = sampler(max_steps=3, size=5000), sampler(size=5000)
    asked = []
    count, order.num_tokens = order.num_tokens, lambda *span: asked.append(span) or count(*span)
    order.packs = order._packs_of_an_epoch(
        lambda packs: StepSizes(packs, 2, 2, False), lambda _: 3, 12
    )
    assert asked == [(0, 64)]
    assert len(order) == pytest.approx(len(whole), rel=0.1)
    first, expected = iter(order), iter(whole)
    assert [next(first) for _ in range(40)] == [next(expected) for _ in range(40)]


def test_more_steps_than_an_epoch_has():
    order = sampler(max_steps=100)
    assert order.whole
    assert [len(packs) for packs in epochs_of(order, 2)] == [len(order)] * 2


class Arguments:
    """What counting asks of TrainingArguments."""

    train_batch_size, world_size, gradient_accumulation_steps = 2, 1, 2
    dataloader_drop_last = False


def test_spans_of_what_was_seen():
    order = sampler()
    plan = StepSizes(len(order), 2, 2, False)
    for steps in (3, plan.steps, plan.steps + 2):
        found = epochs_of(order, 2)
        taken = found[0] + found[1]
        # an epoch's last step may be short, so steps of the second count from its start
        count = min(steps, plan.steps) * 4
        packs = taken[: min(count, len(order))]
        if steps > plan.steps:
            packs += found[1][: (steps - plan.steps) * 4]
        expected = sorted(position for pack in packs for position in pack)
        spans = seen_spans(order, Arguments(), steps)
        assert [p for span in spans for p in range(*span)] == expected


def test_spans_of_a_window_sorted_by_length():
    order = PositionSampler(40, lambda position: int(LENGTHS[position]), 16, 2, 0)
    positions = list(order)
    for steps in (1, 4, 6, 10):
        spans = seen_spans(order, Arguments(), steps)
        assert sorted(p for span in spans for p in range(*span)) == sorted(positions[: 4 * steps])


@pytest.fixture
def packed_tree(tree):
    """The second stage alone, its rows filled up to 160 tokens from windows of 10 records."""
    del tree["stages"][0]
    stage = tree["stages"][0]
    stage["packed"] = {"length": 160, "window": 10}
    stage["training"] |= {"per_device_train_batch_size": 2, "max_steps": 8, "save_steps": 3}
    return tree


def losses_of(folder):
    return [line["loss"] for line in read_log(folder / "instruct" / "training_log.jsonl")]


def test_micro_batches_and_accumulation_see_the_same(packed_tree, write_recipe, tmp_path, capsys):
    recipe, found = str(write_recipe(packed_tree)), []
    for name, size, steps in (("a", "2", "1"), ("b", "1", "2")):
        words = ["--output_dir", str(tmp_path / name)]
        words += ["--stages.instruct.training.per_device_train_batch_size", size]
        words += ["--stages.instruct.training.gradient_accumulation_steps", steps]
        assert main(["train", recipe, *words]) == 0
        found.append(losses_of(tmp_path / name))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 8
    assert "rows an epoch" in capsys.readouterr().out


def test_resumed_within_a_window_to_the_bit(packed_tree, write_recipe, tmp_path, monkeypatch):
    recipe = str(write_recipe(packed_tree))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", recipe, "--output_dir", str(whole)]) == 0
    calls, step = [], VlmTrainer.training_step

    def fail_late(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(VlmTrainer, "training_step", fail_late)
    with pytest.raises(RuntimeError, match="killed"):
        main(["train", recipe, "--output_dir", str(cut)])
    assert main(["train", recipe, "--output_dir", str(cut)]) == 0
    assert len(calls) == 6 + 5  # it went on from step 3 of 8
    assert losses_of(cut) == losses_of(whole)
    weights = [(run / "instruct" / "model.safetensors").read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]
    seen = [
        json.loads((run / "instruct" / "manifest.json").read_text())["records"]
        for run in (cut, whole)
    ]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"packed": {"length": 0}}, "packed: length must be at least 1, not 0"),
        ({"packed": {"size": 9}}, "packed has no field 'size'"),
        ({"packed": {"length": 64}, "length_window": 2}, "leave length_window nothing to sort"),
        ({"packed": {"length": 60}}, "more than 60, the least of"),
    ],
)
def test_mistakes_are_told(fields, words, packed_tree, write_recipe, capsys):
    packed_tree["stages"][0] |= fields
    assert main(["train", str(write_recipe(packed_tree))]) == 2
    assert words in capsys.readouterr().err
