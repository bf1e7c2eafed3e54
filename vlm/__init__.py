"""What does `import vlm` give? The model classes, known to transformers' Auto classes, and loading.

Also installs the torchvision fix (`import_hooks`). The `vlm` command imports this package before it
knows which command runs, and importing torch and transformers takes seconds; there the classes are
registered when a command first needs a model.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import import_hooks

if TYPE_CHECKING:
    from vlm.configuration import VlmConfig
    from vlm.loading import assemble, load_model
    from vlm.modeling import VlmForConditionalGeneration
    from vlm.processing import VlmProcessor

__all__ = [
    "VlmConfig",
    "VlmForConditionalGeneration",
    "VlmProcessor",
    "assemble",
    "load_model",
]

# Everything public comes through this module, which registers on import.
_SOURCE = "vlm.loading"


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_SOURCE), name)


def _is_command() -> bool:
    """Return whether `vlm` or `python -m vlm` is what imports this package."""
    return bool(sys.argv) and Path(sys.argv[0]).stem in ("vlm", "-m")


import_hooks.install()
if not _is_command():
    import vlm.loading  # noqa: F401
