"""How is the base encoder trained? On scenes rendered as it goes, attribute by attribute.

vlm base encoder --out runs/quickstart/base/encoder
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_recipes.scenes.layout import Difficulty, sample_scenes
from data_recipes.scenes.render import render
from data_recipes.scenes.sets import assign_random_boxes
from train.base.attributes import AttributeModel, measure, targets
from train.base.settings import HELD_OUT, BaseSettings, done_before, finish, fit
from vlm.encoders import build_vision_encoder
from vlm.encoders.base import VisionEncoder

NUM_HELD_OUT = 1000  # scenes


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(BaseSettings):
    """What is trained: `encoder` is a config for `build_vision_encoder`, with a grid of 8 x 8."""

    encoder: dict[str, Any] = field(default_factory=dict)


class SceneBatches(Dataset):
    """Item i is batch i, rendered from its own seed: any batch can be had without the ones before.

    Args:
        encoder: tells size, mean and std of the pictures.
        settings: batch size, number of steps, seed.
    """

    def __init__(self, encoder: VisionEncoder, settings: EncoderSettings) -> None:
        self.size = encoder.image_size
        self.mean = torch.tensor(encoder.image_mean)[:, None, None]
        self.std = torch.tensor(encoder.image_std)[:, None, None]
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(index, self.settings.batch_size)

    def batch(self, index: int, num: int) -> dict[str, Tensor]:
        """Return `num` scenes: pixel_values (num, 3, S, S) and the targets (num, 8, 8)."""
        rng = np.random.default_rng([self.settings.seed, index])
        difficulty = Difficulty()
        scenes = sample_scenes(rng, num, difficulty)
        assign_random_boxes(scenes, rng)
        pictures = torch.from_numpy(render(scenes, self.size, rng, difficulty.noise)[0])
        pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        labels = {name: torch.from_numpy(value) for name, value in targets(scenes).items()}
        return {"pixel_values": pixels, **labels}


def train_encoder(settings: EncoderSettings, out: Path) -> dict[str, Any]:
    """Train, write the encoder to `out` and return its report.

    Raises:
        UserError: `out` holds an encoder of other settings, or the config is wrong.
    """
    report = done_before(out, settings)
    if report is not None:
        return report
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    encoder = build_vision_encoder(settings.encoder)
    model = AttributeModel(encoder)
    data = SceneBatches(encoder, settings)
    seconds = fit(model, data, settings, out, "base encoder")
    held_out = data.batch(HELD_OUT, NUM_HELD_OUT)
    pixels = held_out.pop("pixel_values")
    figures = measure(model, pixels, held_out)
    encoder.save_pretrained(out)
    size = sum(p.numel() for p in encoder.parameters())
    return finish(out, settings, {"held_out": figures, "parameters": size, "seconds": seconds})
