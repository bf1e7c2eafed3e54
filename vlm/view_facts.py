"""What does the model tell its connector of the views, beside their features?

Shapes: T views of all images, n images, H_i W_i grid of feature map i, L tokens of an instruction.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from connectors.views import NOTHING_KNOWN, Reading, TextInput, Views
from vlm.tiling import Size, Tiling, plan_of
from vlm.token_layout import shown_parts


def describe_views(
    reads: Collection[Reading],
    tiling: Tiling,
    tile_grids: Tensor,
    image_sizes: Tensor,
    feature_grids: Sequence[Size],
    text: TextInput | None,
) -> Views:
    """Return what the connector reads of the views.

    Args:
        reads: what it wants to know.
        tiling: how the images were cut.
        tile_grids: (n, 2) rows and columns each image was cut into.
        image_sizes: (n, 2) height and width of each image.
        feature_grids: (H_i, W_i) of each feature map.
        text: ids and mask (n, L) of each image's instruction.

    Raises:
        ValueError: a text that is not read, or not one for each image.
    """
    grids = [(rows, cols) for rows, cols in tile_grids.tolist()]
    if text is not None:
        if "text" not in reads:
            raise ValueError("qformer_input_ids are given, but the connector reads no text")
        if len(text.ids) != len(grids):
            raise ValueError(f"qformer_input_ids has {len(text.ids)} rows for {len(grids)} images")
        views = [plan_of(tiling, grid).num_views for grid in grids]
        counts = torch.tensor(views, device=text.ids.device)
        text = TextInput(*(x.repeat_interleave(counts, dim=0) for x in text))
    shown = None
    if "padding" in reads and tiling.pads:
        sizes = [(width, height) for height, width in image_sizes.tolist()]
        pairs = list(zip(sizes, grids, strict=True))
        shown = [
            torch.cat([shown_parts(size, tiling, grid, features) for size, grid in pairs])
            for features in feature_grids
        ]
        shown = [mask.to(tile_grids.device) for mask in shown]
    return Views(shown, text)


def as_text(ids: Tensor | None, mask: Tensor | None) -> TextInput | None:
    """Return ids (n, L) and what is no padding among them; None: there are none."""
    if ids is None:
        return None
    return TextInput(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())


def of_a_blank(reads: Collection[Reading], device: torch.device) -> Views:
    """Return what is said of the one view that stands for images in a batch without any."""
    if "text" not in reads:
        return NOTHING_KNOWN
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return Views(text=TextInput(ids, ids == 0))
