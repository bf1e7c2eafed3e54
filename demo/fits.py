"""Is there memory for several models at once? Asked before any is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

from vlm.errors import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weights_bytes(folder: str | Path, dtype: str | None) -> int:
    """Return how many bytes a checkpoint's weights take in memory; 0: it is not here yet.

    Args:
        folder: of the checkpoint; what it stands on counts too.
        dtype: they are loaded as; None: as they are stored.
    """
    from vlm.on_base import FILES, WEIGHTS, read_base, stands_on_base

    path = Path(folder)
    if not path.is_dir():
        return 0
    if stands_on_base(path):
        return (path / WEIGHTS).stat().st_size + weights_bytes(read_base(path).folder, dtype)
    stored = sum(file.stat().st_size for file in path.glob(FILES))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if dtype is None or config["dtype"] not in BYTES:
        return stored
    return stored * BYTES[dtype] // BYTES[config["dtype"]]


def free_bytes(device: str | None) -> int:
    """Return how much memory is free where models are loaded; None: a GPU if there is one."""
    import psutil
    import torch

    if (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_fits(folders: Sequence[str], dtype: str | None, free: int) -> None:
    """Say early that models do not fit into memory together.

    Raises:
        UserError: their weights alone take more than is free.
    """
    needed = sum(weights_bytes(folder, dtype) for folder in folders)
    if needed > free:
        raise UserError(
            f"the weights of {' and '.join(folders)} take {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB of memory are free; load smaller models, one of them, or both "
            "with --dtype bfloat16"
        )
