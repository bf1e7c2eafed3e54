"""Under which names do ViL's weights lie in published files, and which architecture do they tell?

Published files (`vil2_tiny16_e800_in1k.th` and others) hold a training run's names; the reference's
`hubconf.py` renames them when it loads one. Both the run's names and the model's are read here.
Version 2 trained single blocks and was given pairs afterwards: block 5 of a file is the backward
one of pair 2. Read in `hubconf.py`, not checked against a published file.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from vlm.encoders.vil_blocks import ViLArchitecture
from vlm.errors import UserError

# A run's file calls the model `xlstm`; the norms after the blocks lie beside it.
RUN_PREFIX = "xlstm."
RENAMED = {".xlstm_norm.": ".norm.", ".xlstm.": ".layer."}
BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")
PAIR = ("rowwise_from_top_left", "rowwise_from_bot_right")


def model_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of `ViL`; the classifier is dropped.

    Args:
        state: of a published file or of the reference's classes.
    """
    if any(name.startswith(RUN_PREFIX) for name in state):
        state = _from_run(state)
    if _version(state) == 2:  # there it is the classifier's, see vil_blocks.py
        state = {k: v for k, v in state.items() if not k.startswith("legacy_norm.")}
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def _from_run(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a run's weights under the model's names."""
    # Version 1 has a module around its convolution, version 2 has not.
    paired = not any(name.endswith(".conv1d.conv.weight") for name in state)
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix(RUN_PREFIX)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if paired and (match := BLOCK.fullmatch(name)):
            index, rest = int(match[1]), match[2].replace("layer.conv1d.", "layer.conv.")
            name = f"blocks.{index // 2}.{PAIR[index % 2]}.{rest}"
        renamed[_last_norm(name, paired)] = tensor
    return renamed


def _last_norm(name: str, paired: bool) -> str:
    """Return the model's name of a norm after the blocks: version 1's last one was the head's."""
    after_blocks, in_head = ("norm.", "legacy_norm.") if paired else ("legacy_norm.", "norm.")
    for old, new in (("post_blocks_norm.", after_blocks), ("head.0.", in_head)):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _version(state: Mapping[str, Tensor]) -> int:
    """Return 2 where blocks come in pairs."""
    return 2 if any(f".{PAIR[0]}." in name for name in state) else 1


def read_architecture(state: Mapping[str, Tensor], source: str) -> ViLArchitecture:
    """Return the architecture that the model's weights tell; a stride is not among that.

    Raises:
        UserError: these are not weights of ViL.
    """
    positions, kernel = state.get("pos_embed.embed"), state.get("patch_embed.proj.weight")
    indices = [int(match[1]) for name in state if (match := BLOCK.fullmatch(name))]
    if positions is None or kernel is None or positions.ndim != 4 or not indices:
        raise UserError(
            f"{source} holds no weights of ViL: it needs 'pos_embed.embed' (1, rows, columns, "
            "width), 'patch_embed.proj.weight' and blocks"
        )
    return ViLArchitecture(
        dim=positions.shape[3],
        depth=max(indices) + 1,
        version=2 if _version(state) == 2 else 1,
        patch_size=kernel.shape[-1],
        position_grid=(positions.shape[1], positions.shape[2]),
        legacy_norm="legacy_norm.weight" in state,
    )
