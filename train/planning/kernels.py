"""How do operations whose memory depends on the device look in a rehearsal?

Attention: on the meta device torch takes the form that writes all scores; here it is the fused
kernel, which keeps queries, keys, values, outputs and one number a row. Autocast knows no meta
device; its rules are repeated here. A GPU takes packed documents in one call, and its dropout
keeps a byte for each number where a CPU's keeps a number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from vlm import packed_attention

FLASH = (8, 0)  # the least compute capability of flash attention

# The lists of torch's CUDA autocast (docs: "CUDA Ops that can autocast to ..."), as far as models
# call them.
LOWER = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d),
    *(torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm, torch.Tensor.mm),
}
FLOAT32 = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.softplus),
    *(torch.softmax, torch.log_softmax, torch.Tensor.softmax, torch.layer_norm),
    *(torch.exp, torch.Tensor.exp, torch.rsqrt, torch.Tensor.rsqrt, torch.pow, torch.Tensor.pow),
    *(torch.cumsum, torch.Tensor.cumsum, torch.sum, torch.Tensor.sum, torch.norm),
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand for `F.scaled_dot_product_attention`, (B, heads, L, D), as a fused kernel runs it.

    Every call turns a boolean mask into numbers of its own, which the backward pass keeps. The
    kernel shares the heads of keys and values without `enable_gqa`.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let every call of torch's attention be `attention`, also those in torch's own modules."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def gpu_kernels(autocast: torch.dtype | None) -> Iterator[None]:
    """Let packed documents attend and dropout drop as on a GPU of 2020 or later.

    Args:
        autocast: the lower type of mixed precision, if any.
    """

    def kind(device_type: str, dtype: torch.dtype, *_: Any, **known: Any) -> packed_attention.Kind:
        """Take documents one by one where a GPU would take flex attention: it holds as much."""
        chosen = real.kind("cuda", dtype, FLASH, True, **known)
        return "varlen" if chosen == "varlen" else "each"

    def compute_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
        return autocast or dtype

    def dropout(
        input: Tensor,  # noqa: A002 # its name in torch
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    real = SimpleNamespace(
        kind=packed_attention.packed_kind,
        compute_dtype=packed_attention._compute_dtype,
        dropout=F.dropout,
    )
    packed_attention.packed_kind = kind
    packed_attention._compute_dtype = compute_dtype
    F.dropout = dropout
    try:
        yield
    finally:
        packed_attention.packed_kind = real.kind
        packed_attention._compute_dtype = real.compute_dtype
        F.dropout = real.dropout


class Autocast(TorchFunctionMode):
    """Mixed precision as `torch.autocast("cuda", dtype)` has it.

    Weights that train are cast once in a forward pass and stay until its end (`forget`); others
    are cast wherever they are used.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOWER:
            args, kwargs = tree_map_only(Tensor, self._lower, (args, kwargs))
        elif func in FLOAT32:
            args, kwargs = tree_map_only(Tensor, _raise, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.dtype)
        if id(tensor) not in self._cast:
            self._cast[id(tensor)] = tensor.to(self.dtype)
        return self._cast[id(tensor)]

    def forget(self) -> None:
        """Drop the cast weights, as leaving torch's autocast does."""
        self._cast.clear()


def _raise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
