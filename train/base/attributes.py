"""What does the base encoder learn to see? Dense attributes of the object in every grid cell.

Shapes: B scenes, H W feature grid (8 x 8, in which scenes tell positions), D encoder width.
A cell is labelled when it holds an object's centre; row and column are asked of every cell, because
features without absolute position cannot tell where they look.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_recipes.scenes.layout import SceneBatch
from data_recipes.scenes.vocabulary import (
    BOX_NAMES,
    COLOR_NAMES,
    NUM_CELLS,
    NUM_DEPTH_BINS,
    SHAPES,
)
from vlm.encoders.base import VisionEncoder
from vlm.errors import UserError

# attribute -> number of classes; "object" is yes or no, one logit
CLASSES = {
    "object": 1,
    "color": len(COLOR_NAMES),
    "shape": len(SHAPES),
    "box": len(BOX_NAMES),
    "depth": NUM_DEPTH_BINS,
    "row": NUM_CELLS,
    "column": NUM_CELLS,
}
WEIGHTS = {"object": 4.0, "row": 0.3, "column": 0.3}  # of the losses; 1 where nothing is said
UNKNOWN = -1


def targets(scenes: SceneBatch) -> dict[str, np.ndarray]:
    """Return the classes (B, H, W) of every attribute but row and column; -1 where none is due."""
    shape = (len(scenes), NUM_CELLS, NUM_CELLS)
    row, slot = np.nonzero(scenes.exists)
    place = (row, scenes.cell_y[row, slot], scenes.cell_x[row, slot])
    depth = np.where(scenes.solid[:, None], scenes.depth_bin, UNKNOWN)
    values = {"color": scenes.color, "shape": scenes.shape, "box": scenes.box, "depth": depth}
    out = {"object": np.zeros(shape, dtype=np.int64)}
    out["object"][place] = 1
    for name, value in values.items():
        out[name] = np.full(shape, UNKNOWN, dtype=np.int64)
        out[name][place] = value[row, slot]
    return out


class AttributeModel(nn.Module):
    """An encoder with a linear head per attribute; the heads are thrown away after training."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        if encoder.grids[0] != (NUM_CELLS, NUM_CELLS):
            raise UserError(
                f"the base encoder must see a grid of {NUM_CELLS} x {NUM_CELLS}, not "
                f"{encoder.grids[0]}; change encoder.layer or encoder.image_size"
            )
        self.encoder = encoder
        width = encoder.dims[0]
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(CLASSES.values())))

    def logits(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return (B, H, W, classes) per attribute for pictures (B, 3, S, S)."""
        parts = self.head(self.encoder(pixel_values)[0]).split(list(CLASSES.values()), dim=-1)
        return dict(zip(CLASSES, parts, strict=True))

    def forward(self, pixel_values: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted sum of the attributes' losses."""
        logits = self.logits(pixel_values)
        object_logits = logits.pop("object")[..., 0]
        truth = labels["object"].to(object_logits.dtype)
        loss = WEIGHTS["object"] * F.binary_cross_entropy_with_logits(object_logits, truth)
        cells = torch.arange(NUM_CELLS, device=truth.device)
        places = {"row": cells[:, None], "column": cells[None, :]}
        for name, values in logits.items():
            target = places[name].expand_as(truth) if name in places else labels[name]
            entropy = F.cross_entropy(
                values.flatten(0, 2), target.flatten(), ignore_index=UNKNOWN, reduction="sum"
            )
            known = (target != UNKNOWN).sum().clamp(min=1)
            loss = loss + WEIGHTS.get(name, 1.0) * entropy / known
        return {"loss": loss}


@torch.no_grad()
def measure(model: AttributeModel, pixel_values: Tensor, labels: dict[str, Tensor]) -> dict:
    """Return F1 of "object here" and the accuracy of each attribute at true objects."""
    model.eval()
    logits = model.logits(pixel_values)
    found, truth = logits["object"][..., 0] > 0, labels["object"] == 1
    hits = (found & truth).sum().item()
    figures = {"object_f1": 2 * hits / max(1, found.sum().item() + truth.sum().item())}
    for name in ("color", "shape", "box", "depth"):
        known = labels[name] != UNKNOWN
        right = logits[name].argmax(-1) == labels[name]
        figures[name] = right[known].float().mean().item()
    return {name: round(value, 4) for name, value in figures.items()}
