"""What do layers keep for the backward pass? All, their inputs alone, or their matrix products too.

`training.activation_checkpointing: true` keeps a layer's input and computes the layer again: most
of a second forward pass. With `activation_checkpointing_kwargs: {keep: products}` the outputs of
matrix products and of attention are kept as well, so that only what is cheap is computed again:
norms, activation functions, rotations.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from vlm.errors import UserError

aten = torch.ops.aten
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return `activation_checkpointing_kwargs` as torch's `checkpoint` takes them.

    Raises:
        UserError: `keep` is something else than products, or goes with reentrant checkpoints.
    """
    if options is None or "keep" not in options:
        return None if options is None else dict(options)
    if options["keep"] != "products" or options.get("use_reentrant"):
        raise UserError(
            "activation_checkpointing_kwargs: keep can only be products, and without "
            f"use_reentrant, not {dict(options)}"
        )
    others = {name: value for name, value in options.items() if name != "keep"}
    context = partial(create_selective_checkpoint_contexts, PRODUCTS)
    return {**others, "use_reentrant": False, "context_fn": context}
