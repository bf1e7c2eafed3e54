"""How does RMSNorm learn, keeping its input alone?

By itself autograd keeps the input and the normalised input too, and goes over them nine times where
five do. In float32; where a model computes in another type, its own module runs.

Shapes: N tokens, E width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight of (..., E), as `LlamaRMSNorm` has it (arXiv:1910.07467)."""
    out: Any = _RmsNorm.apply(x, weight, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    """See `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: Tensor
    ) -> Any:
        x, weight, scale = ctx.saved_tensors
        (slope,) = outer
        normal = x * scale
        product = slope * normal
        of_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        # each row less its share along the row itself
        share = (product @ weight).div_(x.shape[-1])[..., None]
        of_x = torch.mul(slope, weight, out=product).sub_(normal.mul_(share)).mul_(scale)
        return of_x, of_weight, None
