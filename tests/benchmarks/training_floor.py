"""How long do a step's matrix products and attention take by themselves?"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.addmm_.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    ATTENTION,
    ATTENTION_BACKWARD,
}
REPEATS = 3


class Products(TorchDispatchMode):
    """Counts the products that run under it, with the shapes and strides of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()
        self.examples: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a product and run it."""
        if func in PRODUCTS:
            leaves, tree = tree_flatten((args, kwargs or {}))
            kept = [Place(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            key = (func, repr(kept))
            self.seen[key] += 1
            self.examples[key] = (kept, tree)
        return func(*args, **(kwargs or {}))

    def replay(self) -> float:
        """Return the CPU seconds of all products, each at its fastest."""
        total = 0.0
        for key, count in self.seen.items():
            call = _prepared(key[0], *self.examples[key])
            call()
            total += count * min(_seconds(call) for _ in range(REPEATS))
        return total


class Place(tuple):
    """A tensor's (shape, strides)."""

    def __new__(cls, tensor: Tensor) -> "Place":
        return super().__new__(cls, (tuple(tensor.shape), tensor.stride()))

    def make(self) -> Tensor:
        """Return a tensor of the same form, of small numbers."""
        shape, strides = self
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if shape else 1
        return torch.randn(max(1, extent)).mul_(0.1).as_strided(shape, strides)


def _prepared(func: Any, kept: list[Any], tree: Any) -> Callable[[], Any]:
    """Return a call of the operation on tensors that are there already, as far as it allows."""
    leaves = [leaf.make() if isinstance(leaf, Place) else leaf for leaf in kept]
    args, kwargs = tree_unflatten(leaves, tree)
    if func is ATTENTION_BACKWARD:  # its output and sums have to be those of its inputs
        grad, query, key, value, _, _, dropout, causal, *more = args
        out, sums = ATTENTION(query, key, value, dropout, causal, **kwargs)
        return lambda: func(grad, query, key, value, out, sums, dropout, causal, *more, **kwargs)
    if func is aten.mm.default:
        out = torch.mm(*args)
        return lambda: torch.mm(*args, out=out)
    return lambda: func(*args, **kwargs)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
