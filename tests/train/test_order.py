"""Are rows of like length padded together, without changing what a step learns from?"""

import numpy as np
import pytest

from train.callbacks import read_log
from train.order import PositionSampler, like_lengths_together
from vlm.cli import main


def padding(lengths, order, micro_batch):
    """Return the padded tokens of the order."""
    batches = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    return sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)


@pytest.mark.parametrize("count", [1, 4, 10, 64])
def test_every_row_once_and_less_padding(count):
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 300, count).tolist()
    order = like_lengths_together(lengths, 4, rng)
    assert sorted(order) == list(range(count))
    assert padding(lengths, order, 4) <= padding(lengths, list(range(count)), 4) * 0.5 or count <= 4


def test_the_short_micro_batch_stays_last():
    order = like_lengths_together([5, 4, 3, 2, 1], 2, np.random.default_rng(0))
    assert order[-1] == 0


def test_lengths_do_not_rise_within_a_window():
    lengths = list(range(256))
    order = like_lengths_together(lengths, 4, np.random.default_rng(0))
    means = np.reshape(order, (-1, 4)).mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_windows_keep_their_records_and_epochs_go_on():
    lengths = np.random.default_rng(1).integers(1, 99, 40).tolist()
    sampler = PositionSampler(20, lambda position: lengths[position], window=8, micro_batch=2)
    first = list(sampler)
    assert [sorted(first[i : i + 8]) for i in (0, 8, 16)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    assert first == list(sampler) != list(range(20))
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(20, 40))


def test_lengths_are_those_of_the_encoded_rows(make_model, make_image, tmp_path):
    _, processor = make_model(tiling={"type": "dynamic", "max_tiles": 4})
    sizes = [(90, 30), (30, 30), (30, 90)]
    images = [make_image(*size) for size in sizes]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    encoded = processor.encode(messages, images, supervise=True)
    assert processor.num_tokens(messages, sizes) == len(encoded["input_ids"])


@pytest.mark.parametrize(
    "change", [{"length_window": 1}, {"packed": True}, {"packed": True, "length_window": 1}]
)
def test_same_losses_with_less_padding(change, tree, write_recipe, tmp_path):
    losses = []
    for number, fields in enumerate(({}, change)):
        tree["output_dir"] = str(tmp_path / f"run{number}")
        for stage in tree["stages"]:
            stage |= fields
            stage["training"] |= {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
            }
        assert main(["train", str(write_recipe(tree))]) == 0
        log = read_log(tmp_path / f"run{number}" / "instruct" / "training_log.jsonl")
        losses.append([line["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_negative_window_is_refused(tree, write_recipe, capsys):
    tree["stages"][1]["length_window"] = -1
    assert main(["train", str(write_recipe(tree))]) == 2
    assert "stages.instruct: length_window must be 0 or more, not -1" in capsys.readouterr().err
