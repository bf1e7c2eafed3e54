"""What would a step hold in memory and compute? The same program, run on tensors without values.

Whatever has a width stands on the meta device: shapes, no values. What decides shapes (ids, masks,
grids, labels, positions) keeps its values on the CPU, so that the model's own forward runs as it
is. A dispatch mode below autograd sees every operation, knows which storages are alive and counts
the floating point operations of matrix products, convolutions and attention.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention.varlen  # which declares its operations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
META = torch.device("meta")
# Integers of more elements than this lose their values too, such as attention masks (B, 1, L, L).
MOST_VALUES = 2**20
# Products that are added to a tensor in place -> the product that torch has a count of.
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return 2 products of all queries with all keys; a causal mask saves nothing here."""
    batch, heads, queries, dim = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (dim + value.shape[3])


def _attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Return twice the forward pass; what a fused kernel computes again is not counted."""
    return 2 * _attention_flops(query, key, value)


def _varlen_flops(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *_: Any, **__: Any
) -> int:
    """Return the same for documents that end at `ends`, all in one row (L, heads, D)."""
    pairs = int(ends.diff().square().sum())
    return 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])


def _varlen_backward_flops(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    ends: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """Return twice the forward pass."""
    return 2 * _varlen_flops(query, key, value, ends)


ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.torch_attn._varlen_attn: _varlen_flops,
    torch.ops.torch_attn._varlen_attn_backward: _varlen_backward_flops,
}


class Rehearsal(TorchDispatchMode):
    """Follows the storages that operations make, and counts what they compute.

    Set `part` and `phase` to say whose they are from now on.

    Attributes:
        peak: most bytes alive at once, gradients of parameters included.
        peak_without_gradients: the same without them.
        flops: (phase, part) -> operations; recomputation has a phase of its own.
        attention_flops: those of `flops` that grow with the square of the length.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Begin; storages of `known`, the model's own, are not counted."""
        super().__init__()
        self.part, self.phase = "", "forward"
        self.peak = self.peak_without_gradients = 0
        self.flops: Counter[tuple[str, str]] = Counter()
        self.attention_flops = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[int, Any]] = {}  # storage -> bytes, its end
        self._bytes = 0
        self._gradients: set[int] = set()
        self._gradient_bytes = 0
        self._shapes: dict[Any, tuple[Any, int, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, or only its shapes."""
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        hollow = [tensor.is_meta for tensor in tensors]
        if not any(hollow) and not _too_large(func, tensors):
            out = _run_real(func, args, kwargs)
        else:
            told = args, kwargs
            if not all(hollow) or "device" in kwargs:
                args, kwargs = _without_values(func, args, kwargs)
            out = self._run_hollow(func, args, kwargs, told)
        if not _is_view(func):
            self._hold(out)
        return out

    def _run_hollow(self, func: Any, args: Any, kwargs: Any, told: tuple[Any, Any]) -> Any:
        """Return the outputs' shapes; layers repeat, so most are known from the layer before.

        `told` are the arguments with what values they have.
        """
        if _is_view(func):
            self._count(*_flops(func, *told, None))
            return func(*args, **kwargs)
        key = (func, _key(args), _key(kwargs))
        known = self._shapes.get(key)
        if known is None:
            out = func(*args, **kwargs)
            known = self._shapes[key] = (_shape_of(out), *_flops(func, *told, out))
        else:
            out = _of_shape(known[0])
        self._count(*known[1:])
        return out

    def _count(self, flops: int, attention: int) -> None:
        """Add an operation's floating point operations to the phase that it is in."""
        if flops:
            # In the backward pass only a checkpoint's second forward runs with gradients enabled.
            again = self.phase == "backward" and torch.is_grad_enabled()
            self.flops["recompute" if again else self.phase, self.part] += flops
            self.attention_flops += 0 if again else attention

    def _hold(self, out: Any) -> None:
        """Follow storages that are new, until they die."""
        for tensor in _tensors((out,)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in self._alive:
                continue
            size = storage.nbytes()
            end = weakref.ref(storage, lambda _, key=key: self._drop(key))
            self._alive[key] = (size, end)
            self._bytes += size
        self.peak = max(self.peak, self._bytes)
        without = self._bytes - self._gradient_bytes
        self.peak_without_gradients = max(self.peak_without_gradients, without)

    def _drop(self, key: int) -> None:
        size, _ = self._alive.pop(key)
        self._bytes -= size
        if key in self._gradients:
            self._gradients.remove(key)
            self._gradient_bytes -= size

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Note that `parameter.grad` is a gradient from now on; a hook of autograd."""
        assert parameter.grad is not None, "called after it was accumulated"
        key = parameter.grad.untyped_storage()._cdata
        if key in self._alive and key not in self._gradients:
            self._gradients.add(key)
            self._gradient_bytes += self._alive[key][0]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values and lists of them; faster than a pytree."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@functools.cache
def _is_view(func: Any) -> bool:
    """Return whether what an operation returns is, or looks into, one of its arguments."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _too_large(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Return whether integers on the CPU would become more than their values are worth."""
    if not tensors:
        return False
    if max(tensor.numel() for tensor in tensors) > MOST_VALUES:
        return True
    if len(tensors) < 2 or func.overloadpacket in INDEXING:
        return False
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        return False  # not an operation that broadcasts
    return shape.numel() > MOST_VALUES


def _run_real(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation whose inputs have values; integers keep theirs, wherever they are sent."""
    out = func(*args, **kwargs)
    if kwargs.get("device") is None or torch.device(kwargs["device"]) != META:
        return out
    if out.is_floating_point() or out.numel() > MOST_VALUES:
        return out
    return func(*args, **{**kwargs, "device": torch.device("cpu")})


def _without_values(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with all tensors on the meta device.

    Boolean indices become positions before, because their sum decides the shape.
    """
    if func.overloadpacket in INDEXING:
        positions: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool:
                assert not index.is_meta, f"{func}: a mask without values cannot choose"
                positions += index.nonzero().unbind(1)
            else:
                positions.append(index)
        args = (args[0], positions, *args[2:])

    def hollow(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta or tensor.dim() == 0 else tensor.to(META)

    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": META}
    return tree_map_only(Tensor, hollow, (tuple(args), kwargs))


def _key(value: Any) -> Any:
    """Return what decides an operation's output shapes, hashable."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), value


def _shape_of(out: Any) -> Any:
    """Return the outputs as shapes."""
    if isinstance(out, Tensor):
        return tuple(out.shape), out.stride(), out.dtype, out.device
    if isinstance(out, (list, tuple)):
        return [_shape_of(item) for item in out]
    return out


def _of_shape(shape: Any) -> Any:
    """Return new tensors of `_shape_of`."""
    if isinstance(shape, tuple):
        size, stride, dtype, device = shape
        return torch.empty_strided(size, stride, dtype=dtype, device=device)
    return tuple(_of_shape(item) for item in shape) if isinstance(shape, list) else shape


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Return an operation's floating point operations, and how many of them are attention's."""
    packet = IN_PLACE.get(func.overloadpacket, func.overloadpacket)
    if packet in ATTENTION:
        flops = ATTENTION[packet](*args, **kwargs)
        return flops, flops
    count = flop_registry.get(packet)
    return (0 if count is None else int(count(*args, **kwargs, out_val=out))), 0
