"""What stands for a language model's linear layers at image tokens? CogVLM's visual expert.

Each linear layer of a decoder layer has a second one for image tokens; attention itself, and the
norms, are one for all tokens. The second weights begin as copies of the first.

Surprises:
- The last token of an image, the reference's `eoi`, goes through the language model's own weights
  (`FusionContext.inner_rows`).
- CogVLM2's experts add a bias to queries, keys and values where the language model has none; such
  a bias begins as zeros.
- The patches of an image share one position (`FusionContext.saved_positions`).

Follows `modeling_cogvlm.py` of THUDM/cogvlm2-llama3-chat-19B; section 2.1 of arXiv:2311.03079.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from connectors.beside_linears import published_modules
from connectors.fusion import Role
from connectors.key_table import KeyTable, Layout, Stacked


@torch.no_grad()
def copy_linear(
    expert: nn.Linear,
    base: nn.Linear,
    gather: AbstractContextManager | None = None,
) -> None:
    """Begin an expert as the language model's own layer, without copying its dtype or device.

    Args:
        expert: as wide as `base`; a bias that `base` lacks becomes zeros.
        base: a layer whose weights are numbers, not packed ones of a quantised model.
        gather: under ZeRO-3 what makes both layers whole meanwhile, and shares out the expert
            again: `deepspeed.zero.GatheredParameters([*expert.parameters(), *base.parameters()],
            modifier_rank=0)`.
    """
    with gather or nullcontext():
        assert expert.weight.shape == base.weight.shape, (expert, base)
        expert.weight.copy_(base.weight)
        if expert.bias is not None:
            expert.bias.zero_() if base.bias is None else expert.bias.copy_(base.bias)


# CogVLM's names of the second linear layers of a decoder layer, and what each computes.
_LINEARS: dict[str, tuple[Role, ...]] = {
    "self_attn.vision_expert_query_key_value": ("q", "k", "v"),
    "self_attn.vision_expert_dense": ("o",),
    "mlp.vision_mlp.gate_proj": ("gate",),
    "mlp.vision_mlp.up_proj": ("up",),
    "mlp.vision_mlp.down_proj": ("down",),
}


def visual_expert_keys(
    layers: Sequence[Mapping[Role, str]], qkv_sizes: Sequence[int], *, qkv_bias: bool
) -> dict[str, KeyTable]:
    """Return {format: {published key: ours}} of CogVLM's and CogVLM2's checkpoints: experts only.

    Args:
        layers: of each decoder layer, {role: name of our expert and a dot}, such as {"q":
            "layers.0.self_attn_q_proj."}; roles that one layer computes have the same name.
            Roles that are left out have no expert.
        qkv_sizes: rows of queries, keys and values.
        qkv_bias: whether their expert adds a bias (CogVLM2).

    Returns:
        Nothing where a host joins gate and up, which are two layers in the checkpoints.
    """
    modules = published_modules(layers, _LINEARS)
    keys: dict[str, str | Layout] = {}
    if modules is None:
        return {}
    for place, ours in modules.items():
        joined = place.endswith("query_key_value")
        for kind in ("weight", "bias") if joined and qkv_bias else ("weight",):
            parts = [f"{name}{kind}" for name in ours]
            stacked = Stacked(*parts, sizes=qkv_sizes)
            keys[f"{place}.{kind}"] = parts[0] if len(parts) == 1 else stacked
    return {"cogvlm": KeyTable(keys, list(modules))}
