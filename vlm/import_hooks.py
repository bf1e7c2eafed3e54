"""How does the torchvision fix come before torchvision, whoever imports it first?

transformers imports torchvision deep inside its own lazy imports, so no order of our imports would
be safe. A finder that is asked first sees the moment, applies the fix and steps aside. In the same
way, and as early, bitsandbytes is kept from advising a package that nobody asked for.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class BeforeTorchvision(MetaPathFinder):
    """Declare torchvision's operators when it is about to be imported; find nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Act on the name "torchvision" once; leave every search to the other finders."""
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        from vlm.torchvision_shim import ensure_torchvision

        ensure_torchvision()


def install() -> None:
    """Put the finder first, unless torchvision is there already or one is waiting."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    waiting = any(isinstance(finder, BeforeTorchvision) for finder in sys.meta_path)
    if "torchvision" not in sys.modules and not waiting:
        sys.meta_path.insert(0, BeforeTorchvision())
