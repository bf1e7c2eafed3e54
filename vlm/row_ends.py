"""What ends the rows of an image's tokens, and on which side of the projection is it learned?

Shapes: E language-model width, C the width before the connector's last projection.

LLaVA-NeXT learns its newline as a token, of width E. XComposer2-4KHD learns newline and separator
beside the merged features, of width C, and projects all together (`build_mlp.py`, `vision_proj`).
Its projection maps each token alone, so projecting the two by themselves gives the same tokens and
gradients. A connector without such a projection (queries, say) has them of width E, as tokens.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from connectors import Connector
from vlm.errors import UserError
from vlm.tiling import Tiling
from vlm.video_layout import VideoConfig

# Our name of a parameter of the model -> the published one's, in XComposer2-4KHD and IXC-2.5.
XCOMPOSER2_KEYS = {"image_newline": "plora_sub_GN", "image_separator": "plora_glb_GN"}


class RowEnds(NamedTuple):
    """The tokens (E,) that stand in the sequence; None: the tiling has none."""

    newline: Tensor | None = None
    separator: Tensor | None = None


def new_row_ends(
    tiling: Tiling, connector: Connector, video: VideoConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and value of the model's parameters for the rows' ends, as published ones begin.

    Args:
        tiling: what says which are there.
        connector: what says how wide they are.
        video: what says whether videos need a newline where images do not.
        dtype: of the parameters; None: torch's default.
    """
    if tiling.has_separator:
        for name in XCOMPOSER2_KEYS:
            yield name, nn.Parameter(torch.zeros(connector.row_end_dim, dtype=dtype))
    elif tiling.has_newline or video.has_newline:
        # As LLaVA-NeXT: the scale of a unit vector's entries.
        newline = torch.randn(connector.text_dim) / connector.text_dim**0.5
        yield "image_newline", nn.Parameter(newline.to(dtype or newline.dtype))


def put_row_ends(module: nn.Module, wanted: Mapping[str, nn.Parameter], keep: bool) -> None:
    """Give a module the learned row ends that it should have, and no other.

    Args:
        module: its own parameters are its row ends.
        wanted: by name.
        keep: whether those that it has already stay as they are.
    """
    have = [name for name, _ in module.named_parameters(recurse=False)]
    for name in have:
        if name not in wanted:
            delattr(module, name)
    for name, vector in wanted.items():
        if not (keep and name in have):
            module.register_parameter(name, vector)


def row_end_tokens(learned: Mapping[str, Tensor], connector: Connector) -> RowEnds:
    """Return the tokens of a model's learned row ends, as they stand in the sequence.

    Args:
        learned: by name, as `new_row_ends` makes them.
        connector: what projects those that are learned before its projection.
    """
    if "image_separator" not in learned:
        return RowEnds(learned.get("image_newline"))
    both = torch.stack([learned["image_newline"], learned["image_separator"]])
    newline, separator = connector.project_row_ends(both)
    return RowEnds(newline, separator)


def published_row_ends(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return image_newline and image_separator, (C,) each, of an XComposer2-4KHD checkpoint.

    Raises:
        UserError: the checkpoint has not both.
    """
    missing = [key for key in XCOMPOSER2_KEYS.values() if key not in state]
    if missing:
        raise UserError(f"the checkpoint has no {' and no '.join(missing)}; is it of a 4KHD model?")
    return {ours: state[theirs].flatten() for ours, theirs in XCOMPOSER2_KEYS.items()}
