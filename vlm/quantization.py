"""How does a frozen language model take less memory? Its linear layers in 4 or 8 bits.

Shapes: F channels out, C channels in of a linear layer.

Every linear layer of the language model is quantised and nothing else: not its embedding and norms,
not the head, the vision tower or the connector. Layers are replaced by what they are, not found by
names: transformers' `llm_int8_skip_modules` matches the start or the end of a full name, and so
quantises a vision tower that was named to be skipped. What came out is checked.

By bitsandbytes. `nf4` is QLoRA's: normal-float 4 bit in blocks of 64, their scales quantised too
(arXiv:2305.14314, section 3). `int8` is LLM.int8 (arXiv:2208.07339): a scale per row, inputs
quantised too, input channels above 6.0 computed apart.

bitsandbytes 0.50.2 reads nf4 weights wrongly on a CPU where a row is not whole blocks: off by 20 to
40 per cent, against 9 elsewhere. Such layers are refused.
"""

import math
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm.errors import UserError

Quantization = Literal["nf4", "int8"]
BLOCK = 64  # of nf4
OUTLIERS = 6.0  # LLM.int8's threshold, section 3.2
# PEFT asks the model by these names which of its layers to use.
MARKS: dict[Quantization, str] = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}


def quantize(model: Any, kind: Quantization, compute_dtype: torch.dtype) -> None:
    """Quantise a language model's linear layers in place, on the CPU.

    Args:
        model: a VlmForConditionalGeneration on the CPU; its other parts stay as they are.
        kind: how.
        compute_dtype: what nf4 weights are multiplied in.

    Raises:
        UserError: the language model reads its weights past its layers, or has no linear layers.
    """
    language_model = model.model.language_model
    names = linears_to_quantize(model, kind)
    for name in names:
        linear: Any = language_model.get_submodule(name)
        quantized = _nf4(linear, compute_dtype) if kind == "nf4" else _int8(linear)
        language_model.set_submodule(name, quantized.requires_grad_(False))
    setattr(model, MARKS[kind], True)
    found = quantized_linears(model)
    assert found == [f"model.language_model.{name}" for name in names], "others were quantised"


def linears_to_quantize(model: Any, kind: Quantization) -> list[str]:
    """Return the paths of a model's linear layers inside its language model.

    Raises:
        UserError: the language model reads its weights past its layers, has no linear layers, or
            they have rows that cannot be quantised.
    """
    language_model = model.model.language_model
    if model.model.state_traits is not None:
        raise UserError(
            f"model.quantization: {type(language_model).__name__} reads the weights of its layers "
            "directly, in its scans, and so cannot be quantised; leave quantization out"
        )
    names = [name for name, each in language_model.named_modules() if type(each) is nn.Linear]
    if not names:
        raise UserError(
            f"model.quantization: {type(language_model).__name__} has no linear layers "
            "(torch.nn.Linear); leave quantization out"
        )
    if kind == "nf4":
        _check_blocks(language_model, names)
    return names


def _check_blocks(language_model: nn.Module, names: list[str]) -> None:
    """Refuse layers whose rows are not whole blocks."""
    for name in names:
        linear: Any = language_model.get_submodule(name)
        if linear.in_features % BLOCK:
            raise UserError(
                f"model.quantization: nf4 needs linear layers whose number of inputs is a multiple "
                f"of {BLOCK}, but {name} has {linear.in_features}; use int8"
            )


def quantized_linears(model: nn.Module) -> list[str]:
    """Return the full names of layers whose weights are integers, whatever part they belong to.

    Layers that only will be are not among them: bitsandbytes' classes hold full weights at first.
    """
    return [
        name
        for name, module in model.named_modules()
        if (weight := module._parameters.get("weight")) is not None
        and not weight.is_floating_point()
    ]


def true_size(weight: Tensor) -> int:
    """Return how many numbers a weight stands for; nf4 keeps two in a byte."""
    state = vars(weight).get("quant_state")
    return weight.numel() if state is None else math.prod(state.shape)


@torch.no_grad()
def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Make plain linear layers of the quantised ones, with the numbers that these stand for."""
    for name in quantized_linears(model):
        module: Any = model.get_submodule(name)
        plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(full_weight(module.weight).to(dtype), requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)
    for mark in MARKS.values():
        vars(model).pop(mark, None)


def full_weight(weight: Any) -> Tensor:
    """Return the numbers (F, C) that a quantised weight stands for, in float32."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    if vars(weight).get("quant_state") is not None:
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB).float()


def _bitsandbytes_nn() -> Any:
    """Return `bitsandbytes.nn`, without types: it declares none of its layers as its own."""
    return import_module("bitsandbytes.nn")


def _nf4(linear: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """Return a linear layer in 4 bits."""
    bnb = _bitsandbytes_nn()
    layer = bnb.Linear4bit(
        *(linear.in_features, linear.out_features),
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # Else a CPU repacks the weight for inference, and no gradient passes it in training after that.
    layer.support_avx512bf16_for_cpu = False
    weight = bnb.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to("cpu")  # this quantises
    layer.bias = linear.bias
    return layer


def _int8(linear: nn.Linear) -> nn.Module:
    """Return a linear layer in 8 bits."""
    bnb = _bitsandbytes_nn()
    layer = bnb.Linear8bitLt(
        *(linear.in_features, linear.out_features),
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIERS,
        device="meta",
    )
    weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to("cpu")  # this quantises
    layer.bias = linear.bias
    return layer
