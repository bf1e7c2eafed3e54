"""Which features are the same? What decides an encoder's numbers, as a key and in plain words.

Two runs share features when encoder, weights, types and the cutting of pictures agree. Versions of
libraries stand beside them in `features.json`, but are no part of the key: they move the last
digits.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_recipes.feature_store import Layout
from vlm.encoders import VisionEncoder
from vlm.image_processing import VlmImageProcessor

FORMAT = 1  # of the folder; another number makes old folders unknown
# The encoder always gets so many views at once, blank ones at the end. The last digits of features
# depend on their number (a single one takes other paths in oneDNN), not on what lies beside a view.
VIEWS_PER_PASS = 32


@dataclass(frozen=True)
class EncoderRun:
    """A frozen encoder as a stage runs it: on a device, perhaps under autocast to a type."""

    tower: VisionEncoder
    device: torch.device
    autocast: torch.dtype | None

    @torch.no_grad()
    def encode(self, views: Tensor) -> list[Tensor]:
        """Return the maps (T, H, W, D) of views (T, 3, S, S), on the CPU, in the type they have."""
        mixed = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast) if mixed else nullcontext():
            return [each.cpu() for each in self.tower(views.to(self.device))]


def describe_features(run: EncoderRun, image_processor: VlmImageProcessor) -> dict[str, Any]:
    """Return, as plain values, all that decides the features of a picture besides the picture."""
    return {
        "format": FORMAT,
        "encoder": without_sources(run.tower.config),
        "weights_sha256": hash_weights(run.tower),
        "dtype": str(run.tower.dtype),
        "autocast": str(run.autocast),
        "device": run.device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "views_per_pass": VIEWS_PER_PASS,
        "view_size": image_processor.view_size,
        "tiling": image_processor.tiling,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
    }


def key_of(description: Mapping[str, Any]) -> str:
    """Return a name for a folder that no other description has."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def without_sources(config: Any) -> Any:
    """Return an encoder's config without the places that weights came from, nested ones too."""
    if isinstance(config, Mapping):
        return {k: without_sources(v) for k, v in config.items() if k != "source"}
    if isinstance(config, (list, tuple)):
        return [without_sources(item) for item in config]
    return config


def hash_weights(module: nn.Module) -> str:
    """Return a hash of all parameters and buffers, with names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def measure(run: EncoderRun) -> tuple[Layout, float]:
    """Return what the maps of one view look like, and the FLOPs of making them.

    Matrix products and convolutions are counted; attention's own products only where torch counts
    them (not on the CPU), and kernels of our own, such as a selective scan's, nowhere.
    """
    size = run.tower.image_size
    with FlopCounterMode(display=False) as counter:
        maps = run.encode(torch.zeros(1, 3, size, size))
    layout = Layout(tuple(tuple(m.shape[1:]) for m in maps), tuple(m.dtype for m in maps))
    return layout, float(counter.get_total_flops())
