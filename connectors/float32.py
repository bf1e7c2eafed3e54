"""How do weights that a reference keeps in float32 survive `model.to(torch.bfloat16)`?"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, bfloat16, float16, nn


class Float32Module(nn.Module):
    """A module whose weights, and those of the modules in it, do not go to half precision.

    `.to(dtype)`, `.half()` and `.bfloat16()` move them to another device but leave their dtype; the
    module's `forward` casts what comes in. A loader that makes new tensors, such as
    `from_pretrained(dtype=...)`, is not held back: it needs the list that `float32_modules` makes.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Do what `nn.Module._apply` does, but undo a cast to half precision."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (float16, bfloat16) and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)


def float32_modules(module: nn.Module, prefix: str) -> set[str]:
    """Return the names, below `prefix`, of the modules in `module` that stay in float32."""
    named = module.named_modules(prefix=prefix)
    return {name for name, part in named if isinstance(part, Float32Module)}
