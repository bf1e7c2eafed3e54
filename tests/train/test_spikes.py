"""Does a loss that jumps stop the run before the weights, with the records' names?"""

import pytest

from train.checkpoints import newest
from train.spikes import WINDOW, SpikeGuard
from vlm.cli import main


def test_the_median_of_steps_that_did_not_jump_is_the_measure(tmp_path):
    guard = SpikeGuard(3.0)
    assert not any(guard.is_spike(loss) for loss in [90.0] * (WINDOW // 2 - 1))
    assert not guard.is_spike(1000.0)  # too few to judge by
    assert not any(guard.is_spike(1.0) for _ in range(WINDOW))
    assert guard.median() == 1.0
    assert not guard.is_spike(3.0) and guard.is_spike(3.1) and guard.is_spike(3.1)
    guard.save(tmp_path)
    again = SpikeGuard(3.0)
    again.load(tmp_path)
    assert again.losses == guard.losses and again.is_spike(3.1)


@pytest.fixture
def spiking(tree, monkeypatch):
    """Three steps are enough to judge by; a rate that leaps at step 5 makes the loss of 6 jump."""
    monkeypatch.setattr("train.spikes.WINDOW", 6)
    del tree["stages"][1]
    stage = tree["stages"][0]
    stage["training"] |= {"max_steps": 12, "lr_scheduler_type": "constant"}
    stage["training"] |= {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    stage["training"]["per_device_train_batch_size"] = 2
    stage["changes"] = [{"at_step": 5, "trainable": {"language_model": 1.0}}]
    return tree


def test_a_spike_stops_before_the_weights(spiking, write_recipe, tmp_path, capsys):
    recipe = str(write_recipe(spiking))
    assert main(["train", recipe, "--stages.align.max_spike", "1.5"]) == 2
    error = capsys.readouterr().err
    assert "the loss jumped to" in error and "from a median of" in error
    assert "at step 7" in error or "at step 6" in error
    names = error.partition("in the batch of records ")[2].partition(";")[0].split(", ")
    assert len(names) == 4 and all(name.startswith("r") for name in names)
    assert not (tmp_path / "run/align/model.safetensors").exists()
    checkpoint = newest(tmp_path / "run/align/checkpoints")
    assert checkpoint is not None and (checkpoint / "losses.json").exists()


def test_without_the_field_it_goes_on(spiking, write_recipe, tmp_path, capsys):
    assert main(["train", str(write_recipe(spiking))]) == 0
    assert not list(tmp_path.glob("run/align/**/losses.json"))


def test_a_measure_below_one_is_refused(spiking, write_recipe, capsys):
    assert main(["train", str(write_recipe(spiking)), "--stages.align.max_spike", "1"]) == 2
    assert "stages.align.max_spike must be above 1, not 1" in capsys.readouterr().err
