"""How does torchvision import beside a CPU torch, when its own build expects CUDA libraries?

The package registry's torchvision links CUDA. Beside a CPU torch its compiled operators cannot
load, and `import torchvision` dies while it registers shapes for operators that are not there:
"operator torchvision::nms does not exist". timm, open_clip, peft and transformers' image processors
import torchvision, but never call those operators, so declaring them is enough. Called, they raise
NotImplementedError.
"""

import functools
import importlib.machinery
import importlib.util
from pathlib import Path

import torch

# What `torchvision/_meta_registrations.py` registers without asking whether its operators loaded.
OPERATORS = ("nms", "qnms")
SCHEMA = "{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache  # also keeps the library alive: its declarations vanish with it
def ensure_torchvision() -> torch.library.Library | None:
    """Declare torchvision's operators where they cannot be loaded; else do nothing.

    Call it before anything imports torchvision; further calls do nothing.

    Returns:
        The declarations, or None where none were needed: torchvision is whole, or not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or operators_load(Path(spec.origin).parent):
        return None
    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(SCHEMA.format(name=name))
    return library


def operators_load(folder: Path) -> bool:
    """Load the compiled operators of the torchvision in `folder`; say whether that worked."""
    extensions = importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES
    spec = importlib.machinery.FileFinder(str(folder), extensions).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:  # what the dynamic linker says: a library it needs is missing or does not fit
        return False
    return True
