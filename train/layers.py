"""How deep in its part does each parameter stand? Below the layers, in one of them, or above.

Surprise: an encoder of stages, such as ConvNeXt, has its stages for layers.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def depths(module: "nn.Module") -> dict[str, tuple[int, int]]:
    """Return (depth, number of layers) for each parameter by its name in `module`.

    Depth 0 is what is made before the layers (embeddings), 1 to the number of layers what stands in
    them, one more what is made after them (the last norm). Encoders side by side count apart.

    Raises:
        UserError: there is no one stack of layers.
    """
    from vlm.encoders.base import VisionEncoder

    inner = [
        (path, encoder)
        for path, encoder in module.named_modules()
        if path and isinstance(encoder, VisionEncoder)
    ]
    if not inner:
        return _depths(module)
    return {
        f"{path}.{name}": place
        for path, encoder in inner
        for name, place in _depths(encoder).items()
    }


def _depths(module: "nn.Module") -> dict[str, tuple[int, int]]:
    """Return the same of a module with one stack of layers."""
    path, layers = _stack(module)
    found, above = {}, False
    for name, _ in module.named_parameters():
        if name.startswith(f"{path}."):
            above = True
            number = int(name.removeprefix(f"{path}.").partition(".")[0])
            found[name] = number + 1, len(layers)
        else:
            found[name] = len(layers) + 1 if above else 0, len(layers)
    return found


def _stack(module: "nn.Module") -> tuple[str, "list[nn.Module]"]:
    """Return (path, layers) of the stack that holds most of a module's parameters."""
    stacks = sorted(_stacks(module, ""), key=lambda found: -sum(map(_size, found[1])))
    kinds = [{type(layer) for layer in layers} for _, layers in stacks]
    if not stacks or any(kinds[0] & others for others in kinds[1:]):
        count = "several stacks" if stacks else "no stack"
        raise UserError(
            f"{type(module).__name__} has {count} of layers, so layers and layer_decay mean "
            "nothing here; leave them out"
        )
    return stacks[0]


def _stacks(module: "nn.Module", path: str) -> "Iterator[tuple[str, list[nn.Module]]]":
    """Yield the outermost lists of layers, and sequences of layers of one class."""
    from torch import nn

    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        layers = list(child.children())
        alike = isinstance(child, nn.Sequential) and len({type(layer) for layer in layers}) == 1
        if (alike or isinstance(child, nn.ModuleList)) and all(_size(layer) for layer in layers):
            yield here, layers
        else:
            yield from _stacks(child, here)


def _size(module: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())
