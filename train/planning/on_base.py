"""How does a language model look that is quantised or has an adapter, where nothing has values?

Shapes: F channels out, C channels in of a linear layer, M tokens.

The adapter is PEFT's own, put in as training puts it in. Quantised layers stand for those of
bitsandbytes 0.50 (`MatMul4Bit`, `MatMul8bitFp` and `MatMul8bitLt` in its autograd/_functions.py):
packed weights, which are made whole for a moment wherever they are used; in 8 bits the backward
pass also keeps the inputs, though it does not need them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from train.planning.rehearsal import META
from vlm.adapters import AdapterConfig, add_adapter
from vlm.quantization import BLOCK, Quantization, linears_to_quantize

# nf4: a scale of one byte for each block, and in float32 a scale of 256 of these, the 16 numbers
# of the format, the 256 of its scales, and what these are counted from.
SCALES_BLOCK = 256
NF4_TABLES = 4 * (16 + 256 + 1)


def packed_bytes(kind: Quantization, out_features: int, in_features: int) -> int:
    """Return what a layer's weights (F, C) take with all that belongs to them."""
    numbers = out_features * in_features
    if kind == "int8":
        return numbers + 4 * out_features  # a scale for each row
    blocks = numbers // BLOCK
    return numbers // 2 + blocks + 4 * -(-blocks // SCALES_BLOCK) + NF4_TABLES


class PackedLinear(nn.Linear):
    """A quantised linear layer on the meta device; trains no weights."""

    def __init__(self, linear: nn.Linear, kind: Quantization, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a whole weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        self.compute_dtype = compute_dtype
        size = packed_bytes(kind, self.out_features, self.in_features)
        packed = torch.empty(size, dtype=torch.uint8, device=META)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The whole weight (F, C), made anew."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=self.compute_dtype, device=META)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 # its name in nn.Linear
        """Map (..., C) to (..., F), of the input's type."""
        x = input.to(self.compute_dtype)
        out = _Product.apply(x.flatten(0, -2), self)
        assert isinstance(out, Tensor)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(input.dtype).unflatten(0, input.shape[:-1])


class _Product(torch.autograd.Function):
    """The product with a packed weight; its backward pass has no gradient of weights.

    The operations are called below autocast, as bitsandbytes calls its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        """(M, C) -> (M, F)."""
        ctx.layer = layer
        if layer.kind == "int8":
            ctx.kept = x  # theirs is an attribute too, which a checkpoint does not let go
        with torch.enable_grad():  # a rehearsal tells a checkpoint's second forward by it
            return torch.ops.aten.mm(x.detach(), layer.weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(M, F) -> (M, C)."""
        return torch.ops.aten.mm(gradients[0], ctx.layer.weight), None


def put_on_base(
    model: Any,
    adapter: AdapterConfig | None,
    quantization: Quantization | None,
    compute_dtype: torch.dtype,
    autocast: bool,
) -> None:
    """Quantise a language model on the meta device and give it an adapter, as training does.

    Args:
        model: a VlmForConditionalGeneration on the meta device.
        adapter: which, if any.
        quantization: how, if at all.
        compute_dtype: what nf4 weights are multiplied in.
        autocast: whether it runs in mixed precision.

    Raises:
        UserError: the model cannot be quantised, or cannot have such an adapter.
    """
    language_model = model.model.language_model
    if quantization is not None:
        for name in linears_to_quantize(model, quantization):
            linear: Any = language_model.get_submodule(name)
            packed = PackedLinear(linear, quantization, compute_dtype)
            language_model.set_submodule(name, packed)
    if adapter is not None:
        add_adapter(model, adapter)
        if quantization is not None and autocast:
            # PEFT's classes for bitsandbytes leave inputs as they are where autocast casts them.
            for module in language_model.modules():
                vars(module).update(cast_input_dtype_enabled=False)


def state_bytes(model: nn.Module, weight: int) -> tuple[int, int, float]:
    """Return (parameters that train, others, bytes of one of the others on average).

    Args:
        model: with its parts that train requiring gradients; packed bytes count as a parameter
            each.
        weight: bytes of a floating point number.
    """
    trained = frozen = size = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
            size += parameter.numel() * (weight if parameter.is_floating_point() else 1)
    return trained, frozen, size / frozen if frozen else weight
