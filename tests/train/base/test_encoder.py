"""Does the base encoder learn what the scene holds, go on after a stop, and load like any other?"""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_recipes.scenes.layout import Difficulty, sample_scenes
from train.base import encoder as encoder_module
from train.base.attributes import CLASSES, UNKNOWN, AttributeModel, measure, targets
from train.base.encoder import EncoderSettings, SceneBatches, train_encoder
from train.base.settings import load_settings
from train.checkpoints import newest
from vlm.encoders import build_vision_encoder, load_vision_encoder
from vlm.errors import UserError

TINY = {
    "type": "timm",
    "architecture": "resnet10t",
    "model_args": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]},
    "layer": -3,
    "image_size": 64,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SETTINGS = EncoderSettings(
    steps=4, batch_size=4, learning_rate=1e-3, save_steps=1, warmup_steps=1, encoder=TINY
)


RECIPES = sorted((Path(__file__).parents[3] / "train/recipes").glob("base-encoder*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_encoders_have_the_grid_that_scenes_are_told_in(recipe):
    settings = load_settings(EncoderSettings, recipe, [])
    with torch.device("meta"):
        encoder = build_vision_encoder(settings.encoder)
    assert encoder.grids == ((8, 8),)
    assert 0.75e6 < sum(p.numel() for p in encoder.parameters()) < 0.9e6


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(encoder_module, "NUM_HELD_OUT", 8)


def test_targets_stand_where_the_objects_are():
    scenes = sample_scenes(np.random.default_rng(0), 20, Difficulty())
    labels = targets(scenes)
    assert (labels["object"].sum((1, 2)) == scenes.exists.sum(1)).all()
    for row, slot in zip(*np.nonzero(scenes.exists), strict=True):
        place = (row, scenes.cell_y[row, slot], scenes.cell_x[row, slot])
        assert labels["color"][place] == scenes.color[row, slot]
        assert labels["shape"][place] == scenes.shape[row, slot]
        depth = scenes.depth_bin[row, slot] if scenes.solid[row] else UNKNOWN
        assert labels["depth"][place] == depth


def test_a_perfect_reader_scores_one():
    model = AttributeModel(build_vision_encoder(TINY))
    batch = SceneBatches(model.encoder, SETTINGS).batch(0, 16)
    pixels = batch.pop("pixel_values")

    def perfect(_):
        out = {}
        for name, classes in CLASSES.items():
            if name in batch:
                hot = torch.nn.functional.one_hot(batch[name].clamp(min=0), max(classes, 2))
                out[name] = hot.float()
        out["object"] = batch["object"].float()[..., None] * 2 - 1
        return out

    model.logits = perfect
    assert set(measure(model, pixels, batch).values()) == {1.0}


def test_training_learns():
    torch.manual_seed(0)
    model = AttributeModel(build_vision_encoder(TINY))
    batch = SceneBatches(model.encoder, SETTINGS).batch(0, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    train_encoder(SETTINGS, tmp_path / "whole")
    batch = SceneBatches.batch

    def stop(self, index, num):
        if index == 3:
            raise KeyboardInterrupt
        return batch(self, index, num)

    monkeypatch.setattr(SceneBatches, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(SETTINGS, tmp_path / "stopped")
    assert newest(tmp_path / "stopped/checkpoints") is not None
    monkeypatch.setattr(SceneBatches, "batch", batch)
    train_encoder(SETTINGS, tmp_path / "stopped")
    whole, stopped = (
        load_vision_encoder({"type": "timm", "source": str(tmp_path / name)}).state_dict()
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not (tmp_path / "stopped/checkpoints").exists()


def test_settings_come_from_yaml_and_misspelt_ones_are_told(tmp_path):
    recipe = tmp_path / "base.yaml"
    recipe.write_text("steps: 5\nbatch_size: 2\nlearning_rate: 1e-3\n")
    settings = load_settings(EncoderSettings, recipe, ["--steps", "7"])
    assert (settings.steps, settings.learning_rate) == (7, 1e-3)
    with pytest.raises(UserError, match=r"stepz.*did you mean 'steps'"):
        load_settings(EncoderSettings, recipe, ["--stepz", "7"])
