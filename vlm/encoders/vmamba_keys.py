"""Under which names do VMamba's weights come, and what are they called here?

Names here are those of the training code (MzeroMiko/VMamba, classification/models/vmamba.py), which
the published files have. Others that are read:
- vmamba.py, the later single file, holds the scan's projections as grouped 1 x 1 weights;
- older files name blocks and stem after Swin, and hold projections as 4-D convolutions;
- files of the detection backbone have a norm for each stage in place of the classifier's.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Of whole names, in this order; `_load_from_state_dict` of vmamba.py has the same table.
RENAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"^(layers\.\d+\.downsample)\.norm\.", r"\1.1."),
    (r"^(layers\.\d+\.downsample)\.reduction\.", r"\1.2."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)
# Grouped 1 x 1 weights of the four walks and the stacks that they are views of.
STACKED = {"op.x_proj.weight": "op.x_proj_weight", "op.dt_projs.weight": "op.dt_projs_weight"}


def rename(name: str) -> str:
    """Return today's name of a weight.

    >>> rename("layers.0.blocks.1.self_attention.in_proj.weight")
    'layers.0.blocks.1.op.in_proj.weight'
    """
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names and in the shapes of `vmamba_model.VMamba`."""
    result = {}
    for old, tensor in state.items():
        name = rename(old)
        if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # a projection that was a 1 x 1 convolution
        for grouped, stacked in STACKED.items():
            if name.endswith(grouped):
                name = name.removesuffix(grouped) + stacked
                tensor = tensor.unflatten(0, (4, -1))
        result[name] = tensor
    return result


def with_output_norms(state: Mapping[str, Tensor], stages: int, width: int) -> dict[str, Tensor]:
    """Return the weights with the norms of the last two of `stages` where files lack them.

    Args:
        state: weights under today's names.
        stages: how many there are.
        width: D of the stage before the last.
    """
    result = dict(state)
    name = f"outnorm{stages - 2}"
    if not any(key.startswith(f"{name}.") for key in state):  # half a norm is a broken file
        result |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    for kind in ("weight", "bias"):
        if f"outnorm{stages - 1}.{kind}" in state:
            last = state[f"outnorm{stages - 1}.{kind}"]
            result.setdefault(f"classifier.norm.{kind}", last)
    return result
