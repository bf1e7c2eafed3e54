"""How are weights read from a published checkpoint file, or from a folder that holds one?

Published files are training states: a dict with the weights under "model" beside the optimizer and
the settings of the run, an `argparse.Namespace` (Vim) or a yacs `CfgNode` (VMamba). They are
unpickled by `torch.load(weights_only=True)`, which builds tensors and plain containers only; those
two are the only further classes let in, the second as an OrderedDict: yacs need not be installed.
"""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm.encoders.base import CONFIG_FILE
from vlm.errors import UserError

WEIGHTS_FILE = "model.safetensors"
PICKLES = (".pth", ".pt", ".th", ".bin")
WEIGHT_KEYS = ("model", "state_dict")
# The classes of a run's settings, let in beside tensors and plain containers.
SETTINGS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]


def find_checkpoint(source: str) -> Path:
    """Return the weights file that `source` is, or the only one in the folder that it is.

    Raises:
        UserError: there is none, or more than one.
    """
    path = Path(source)
    if path.is_file():
        return path
    if (path / CONFIG_FILE).is_file():
        return path / WEIGHTS_FILE
    found = sorted(p for p in path.glob("*") if p.suffix in (*PICKLES, ".safetensors"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UserError(
            f"vision encoder: source {source!r} must be a checkpoint file ({', '.join(PICKLES)} or "
            f".safetensors) or a folder with exactly one; found {names}"
        )
    return found[0]


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, on the CPU.

    Raises:
        UserError: the file cannot be read, would run code, or holds no weights.
    """
    if file.suffix not in PICKLES:
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"vision encoder: cannot read the weights {file}: {error}") from error
    try:
        with torch.serialization.safe_globals(SETTINGS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        text = str(error)
        reason = (text.partition("WeightsUnpickler error:")[2] or text).strip().partition("\n")[0]
        raise UserError(
            f"vision encoder: cannot read the weights {file}: {reason or 'it is empty or cut off'}"
        ) from error
    nested = [content[k] for k in WEIGHT_KEYS if isinstance(content, dict) and k in content]
    state = nested[0] if nested else content
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise UserError(
            f"vision encoder: {file} holds no weights: expected a dict of tensors, alone or under "
            f"{' or '.join(map(repr, WEIGHT_KEYS))}"
        )
    return state


def save_weights(module: nn.Module, folder: Path) -> None:
    """Write the module's weights, under its own names, to a folder."""
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
