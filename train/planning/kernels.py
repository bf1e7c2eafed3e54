"""How do operations whose memory depends on the device look in a rehearsal?

Attention: on the meta device torch takes the form that writes all scores; here it is the fused
kernel, which keeps queries, keys, values, outputs and one number a row. Autocast knows no meta
device; its rules are repeated here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

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
