"""Do changes inside a run come at their step, leave the rest alone, and outlive a kill?"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from train.averages import FILE, WeightAverage, decay_at
from train.callbacks import read_log
from train.freeze import freeze, optimizer_groups
from train.phases import PhaseSwitch, follow_phases, phase_at
from vlm.cli import main
from vlm.loading import load_model

STARTS = (0, 3, 5)


def test_phases_begin_once_their_steps_are_done():
    assert [phase_at(step, STARTS) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_the_schedule_multiplies_the_peaks_of_the_phase(make_model):
    model, _ = make_model()
    phases = [{"connector": 1.0}, {"connector": 0.1, "vision_tower": 2.0}, {"vision_tower": 4.0}]
    groups = freeze(model, phases[0], phases[1:])
    optimizer = torch.optim.SGD(optimizer_groups(model, groups, 0.0))
    scheduler = LambdaLR(optimizer, lambda step: (10 - step) / 10)
    follow_phases(scheduler, groups, STARTS)
    found = []
    for _ in range(7):
        found.append({group["part"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    connector = [1.0, 0.9, 0.8, 0.07, 0.06, 0, 0]
    assert [rates["connector"] for rates in found] == pytest.approx(connector)
    assert [rates["vision_tower"] for rates in found] == pytest.approx([0, 0, 0, 1.4, 1.2, 2, 1.6])


def test_a_switch_drops_the_state_of_what_it_freezes_alone(make_model):
    model, _ = make_model()
    groups = freeze(model, {"connector": 1.0}, [{"vision_tower": 1.0}, {"connector": 1.0}])
    optimizer = torch.optim.AdamW(optimizer_groups(model, groups, 0.1))
    switch = PhaseSwitch(groups, STARTS, 0.1)
    tower, connector = model.model.vision_tower, model.model.connector
    for step, (trains, rests) in {0: (connector, tower), 3: (tower, connector)}.items():
        state = type("State", (), {"global_step": step})
        switch.on_step_begin(None, state, None, model=model, optimizer=optimizer)
        assert all(p.requires_grad for p in trains.parameters())
        assert not any(p.requires_grad for p in rests.parameters())
        for parameter in trains.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert {id(p) for p in optimizer.state} == {id(p) for p in trains.parameters()}
        assert all(p.grad is None for p in rests.parameters())
    decays = {(group["part"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays == {("connector", 0.0), ("vision_tower", 0.0), ("vision_tower", 0.1)}


@pytest.fixture
def changing(tree):
    """Six steps: connector and encoder, from step 3 connector and an upper layer; an average."""
    stage = tree["stages"][0]
    del tree["stages"][1]
    stage["trainable"] = {"connector": 1e-2, "vision_tower": 1e-3}
    upper = {"learning_rate": 1e-2, "layers": "1-", "layer_decay": 0.5}
    stage["changes"] = [{"at_step": 3, "trainable": {"connector": 5e-3, "language_model": upper}}]
    stage["ema"] = {"decay": 0.5}
    stage["training"] |= {"save_steps": 1, "save_total_limit": 9, "weight_decay": 0.1}
    return tree


def run(recipe, folder):
    assert main(["train", str(recipe), "--output_dir", str(folder)]) == 0
    return folder / "align"


def moved(before, after):
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_each_phase_moves_its_own_weights(changing, write_recipe, tmp_path, capsys):
    stage = run(write_recipe(changing), tmp_path / "a")
    told = capsys.readouterr().out
    assert "from step 3 on:" in told and "layers 1-" in told
    steps = [stage / "checkpoints" / f"checkpoint-{step}" for step in range(1, 7)]
    parts = ("model.connector.", "model.vision_tower.")
    later = ("model.connector.", "model.language_model.layers.1.", "model.language_model.norm")
    for number in range(5):
        found, allowed = moved(*steps[number : number + 2]), parts if number < 2 else later
        assert found and all(name.startswith((*allowed, "lm_head.")) for name in found)
        assert all(any(name.startswith(prefix) for name in found) for prefix in allowed)
        assert ("lm_head.weight" in found) == (number >= 2)

    # the optimizer's memory: 6 steps of the connector, 3 of what joined, none of what is frozen
    state = torch.load(steps[-1] / "optimizer.pt", weights_only=True)["state"]
    assert {int(held["step"]) for held in state.values()} == {3, 6}
    before = torch.load(steps[2] / "optimizer.pt", weights_only=True)["state"]
    kept = [number for number in state if int(state[number]["step"]) == 6]
    assert kept and all(int(before[number]["step"]) == 3 for number in kept)
    assert set(before) - set(state)

    log = read_log(stage / "training_log.jsonl")
    assert log[3]["learning_rate/vision_tower"] == 0 < log[1]["learning_rate/vision_tower"]
    ratio = log[3]["learning_rate/language_model"] / log[3]["learning_rate/connector"]
    assert ratio == pytest.approx(2)


def test_the_final_folder_says_which_weights_it_holds(changing, write_recipe, tmp_path):
    recipe = write_recipe(changing)
    averaged = run(recipe, tmp_path / "a")
    words = ["--stages.align.ema.use", "trained", "--output_dir", str(tmp_path / "b")]
    assert main(["train", str(recipe), *words]) == 0
    trained = tmp_path / "b" / "align"
    names = {
        stage: json.loads((stage / "manifest.json").read_text())["weights"]
        for stage in (averaged, trained)
    }
    assert names == {averaged: "average", trained: "trained"}
    last = averaged / "checkpoints" / "checkpoint-6"
    average = load_file(last / FILE)
    final = load_file(averaged / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in average.items())
    assert not (averaged / FILE).exists()
    assert (trained / FILE).read_bytes() == (last / FILE).read_bytes()
    assert not moved(last, trained) and moved(averaged, trained)
    load_model(averaged)


@pytest.mark.parametrize("killed_after", [2, 3, 4, 6])
def test_killed_around_a_change_equals_one_left_alone(
    changing, write_recipe, tmp_path, killed_after
):
    recipe = write_recipe(changing)
    whole = run(recipe, tmp_path / "whole")
    cut = tmp_path / "cut" / "align"
    shutil.copytree(whole, cut)
    for step in range(killed_after + 1, 7):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    (cut / "model.safetensors").unlink()
    manifest = json.loads((cut / "manifest.json").read_text())
    (cut / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    run(recipe, tmp_path / "cut")
    logs = [read_log(folder / "training_log.jsonl") for folder in (whole, cut)]
    told = [[(line["step"], line["loss"], line["grad_norm"]) for line in log] for log in logs]
    assert told[0] == told[1] and len(told[0]) == 6
    last = "checkpoints/checkpoint-6"
    for name in ("model.safetensors", f"{last}/model.safetensors", f"{last}/{FILE}"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    states = [torch.load(f / last / "optimizer.pt", weights_only=True) for f in (whole, cut)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, held in states[0]["state"].items():
        other = states[1]["state"][number]
        assert all(torch.equal(held[key], other[key]) for key in held)


def test_a_change_beyond_the_stage_is_told_before_training(changing, write_recipe, capsys):
    changing["stages"][0]["changes"][0]["at_step"] = 6
    assert main(["train", str(write_recipe(changing))]) == 2
    error = capsys.readouterr().err
    assert "stages.align.changes: at_step 6 is never reached, the stage has 6 steps" in error


def test_layers_of_a_later_stage_are_checked_before_the_first(tree, write_recipe, capsys):
    rates = {"learning_rate": 1e-3, "layers": [1, 3]}
    tree["stages"][1]["trainable"]["language_model"] = rates
    assert main(["train", str(write_recipe(tree))]) == 2
    error = capsys.readouterr().err
    assert "stages.instruct: trainable.language_model: layers [1, 3] go beyond" in error


def test_the_average_is_float32_and_its_decay_grows():
    assert [decay_at(step, 0.9) for step in (1, 8, 10_000)] == [2 / 11, 0.5, 0.9]
    model = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    first, second = (torch.full((2, 2), value) for value in (1.0, 2.0))
    with torch.no_grad():
        model.weight.copy_(first)
        average = WeightAverage(model, 0.9)
        model.weight.copy_(second)
    average.update(model, 1)
    expected = first.lerp(second, 1 - 2 / 11)
    assert torch.equal(average.values["weight"], expected)
    average.copy_to(model)
    assert torch.equal(model.weight, expected.bfloat16())
