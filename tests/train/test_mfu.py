"""Do batches cost what their own step computes, and is MFU that cost over time and peak?"""

import pytest
import torch

from train.freeze import freeze
from train.measures import Window
from train.mfu import BatchWork, count_work, make_meter
from train.planning.gpus import DEVICE_NAMES, GPUS, measured_peak, peak_of
from train.planning.step import Sample, make_batch, rehearse
from vlm.adapters import AdapterConfig
from vlm.modeling import VlmForConditionalGeneration

ALL = ("vision_tower", "connector", "language_model")
ANYRES = {"type": "anyres"}


def hollow(config):
    with torch.device("meta"):
        model = VlmForConditionalGeneration(config)
    model.tie_weights()
    model.model.language_model.config._attn_implementation = "sdpa"
    return model


@pytest.mark.parametrize(
    ("changes", "trained"),
    [({}, ALL), ({}, ("connector",)), ({"tiling": ANYRES, "tied": True}, ("language_model",))],
)
def test_any_batch_costs_what_its_step_computes(make_model, changes, trained):
    model, _ = make_model(**changes)
    groups = freeze(model, dict.fromkeys(trained, 1e-3))
    work = count_work(model.config, {name for group in groups for name in group.names})
    other = hollow(model.config)
    freeze(other, dict.fromkeys(trained, 1e-3))
    for sample in (Sample(((48, 40),), 20, 9), Sample(((90, 30), (33, 70)), 150, 11)):
        batch = make_batch(other, sample, 1)
        assert float(work.of(batch)) == pytest.approx(rehearse(other, sample, 1).flops, rel=1e-6)


def test_padding_and_stored_features_cost_nothing():
    work = BatchWork(encoded=1e9, view=1e6, token=1e4, pair=1, learnt=100)
    labels = torch.tensor([[-100, 5, 6], [5, -100, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    padded = {"input_ids": labels, "labels": labels, "attention_mask": mask}
    assert float(work.of(padded)) == 2 * 100 + (9 + 4) + 5 * 1e4
    joined = torch.tensor([[-100, 5, 6, -100, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = {"input_ids": joined, "labels": joined, "position_ids": positions}
    assert float(work.of(packed)) == 3 * 100 + (9 + 4) + 5 * 1e4
    shown = {**packed, "pixel_values": torch.zeros(2, 3, 4, 4)}
    assert float(work.of(shown)) == pytest.approx(2 * (1e9 + 1e6) + 50313)
    stored = {**packed, "vision_features": [torch.zeros(2, 4, 4, 8)]}
    assert float(work.of(stored)) == pytest.approx(2 * 1e6 + 50313)


def test_an_adapters_products_count_and_frozen_weights_save_theirs(make_model):
    pytest.importorskip("peft")
    model, _ = make_model()
    names = {name for name, _ in model.named_parameters()}
    connector = {name for name in names if name.startswith("model.connector")}
    plain = count_work(model.config, connector)
    beside = count_work(model.config, connector, AdapterConfig(type="lora", rank=4))
    # the linear layers of both blocks: width 32, key and value 16, inner 64; forward and back.
    # In the last one what comes behind attention sees supervised tokens alone.
    before, behind = (32 + 32) + 2 * (32 + 16), (32 + 32) + 3 * (32 + 64)
    assert beside.token - plain.token == 2 * 2 * 4 * (2 * before + behind)
    assert beside.learnt - plain.learnt == 2 * 2 * 4 * behind
    assert count_work(model.config, names).token == pytest.approx(1.5 * plain.token)


def test_mfu_is_work_over_time_and_peak():
    window = Window(flops=torch.tensor(3e12), peak=1e12)
    window.start -= 10
    assert window.rates()["mfu"] == pytest.approx(0.3, rel=0.01)
    assert "mfu" not in Window().rates()


def test_peaks_of_devices(monkeypatch):
    assert set(DEVICE_NAMES.values()) == set(GPUS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_of(torch.device("cuda"), torch.float32) == 989.4e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")
    assert peak_of(torch.device("cuda"), torch.float32) is None
    assert measured_peak(torch.float32, 1) > 1e8


def test_each_phase_has_its_cost_and_no_random_number_is_drawn(make_model):
    model, _ = make_model()
    groups = freeze(model, {"connector": 1e-3}, [{"vision_tower": 1e-3, "connector": 1e-3}])
    before = torch.get_rng_state()
    meter = make_meter(model, groups, (0, 3), None, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    batch = make_batch(hollow(model.config), Sample(((48, 40),), 20, 9), 1)
    costs = [float(meter.of(batch, step)) for step in range(5)]
    assert costs[0] == costs[2] < costs[3] == costs[4]
    assert meter.peak


def test_where_nobody_knows_the_reason_is_told(make_model, monkeypatch):
    model, _ = make_model()
    cuda, groups = torch.device("cuda"), freeze(model, {"connector": 1e-3})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")
    meter = make_meter(model, groups, (0,), None, cuda, torch.float32)
    assert meter.peak is None and "NVIDIA A10G" in meter.why and meter.of({}, 0) == 0
    meter = make_meter(torch.nn.Linear(1, 1), [], (0,), None, cuda, torch.float32)
    assert "objective" in meter.why
