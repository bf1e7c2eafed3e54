"""Where in a language model are its decoder layers and their linear layers, per family?

Connectors that act inside the language model need it; a new family is one entry of HOSTS.

InternLM2 is loaded as a Llama (vlm/internlm2.py).
Surprise: the place between attention and feed-forward part is no module. The residual is added
inline, so what is to be added there is added to the branch that ends before (`attention_end`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from connectors.fusion import ROLES, HostLinear, HostShape, LinearSite, Role
from vlm.errors import UserError


@dataclass(frozen=True)
class HostFamily:
    """How the decoder layers of a family are built.

    Attributes:
        linears: path of a linear layer in a decoder layer -> what it computes.
        layers: path of the list of decoder layers in the bare language model.
        attention: path of the module whose forward takes the layer's keyword arguments and runs
            before all linear layers.
        attention_start: module that takes the hidden states which the residual path keeps.
        attention_end: module whose output is added to the residual.
    """

    linears: Mapping[str, tuple[Role, ...]] = field(
        default_factory=lambda: {
            "self_attn.q_proj": ("q",),
            "self_attn.k_proj": ("k",),
            "self_attn.v_proj": ("v",),
            "self_attn.o_proj": ("o",),
            "mlp.gate_proj": ("gate",),
            "mlp.up_proj": ("up",),
            "mlp.down_proj": ("down",),
        }
    )
    layers: str = "layers"
    attention: str = "self_attn"
    attention_start: str = "input_layernorm"
    attention_end: str = "self_attn"


_LLAMA = HostFamily()
_GEMMA2 = HostFamily(attention_end="post_attention_layernorm")
_PHI3 = HostFamily(
    linears={
        "self_attn.qkv_proj": ("q", "k", "v"),
        "self_attn.o_proj": ("o",),
        "mlp.gate_up_proj": ("gate", "up"),
        "mlp.down_proj": ("down",),
    },
    attention_end="resid_attn_dropout",
)

# model_type of the language model's config -> its family.
HOSTS: dict[str, HostFamily] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "internlm3": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def family_of(language_model: PreTrainedModel) -> HostFamily:
    """Return how the language model's layers are built.

    Raises:
        UserError: nobody has written it down yet.
    """
    model_type = language_model.config.model_type
    if model_type not in HOSTS:
        raise UserError(
            f"the connector acts inside the language model, and where the layers of "
            f"{model_type!r} ({type(language_model).__name__}) are is not known: add a HostFamily "
            f"with its layers and linear layers to HOSTS in vlm/hosts.py, or choose a language "
            f"model of {', '.join(sorted(HOSTS))}, or a connector that only projects"
        )
    return HOSTS[model_type]


def decoder_layers(language_model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a bare language model."""
    return list(cast(Any, language_model.get_submodule(family_of(language_model).layers)))


def linear_at(layer: nn.Module, path: str) -> nn.Module:
    """Return a decoder layer's linear layer, without what PEFT wraps around it."""
    module = layer.get_submodule(path)
    while "base_layer" in module._modules:
        module = module.get_submodule("base_layer")
    return module


def linear_of(language_model: PreTrainedModel, site: LinearSite) -> nn.Module:
    """Return the linear layer at a site of a bare language model."""
    return linear_at(decoder_layers(language_model)[site.layer], site.name)


def host_shape(language_model: PreTrainedModel) -> HostShape:
    """Return the numbers of a bare language model that connectors inside it are built from.

    Raises:
        UserError: its family is not in HOSTS, or a layer is not as HOSTS has it.
    """
    family = family_of(language_model)
    config = language_model.config
    roles = {role for linear in family.linears.values() for role in linear}
    assert roles == set(ROLES), f"HOSTS of {config.model_type} names {roles}"
    layers = []
    for number, layer in enumerate(decoder_layers(language_model)):
        linears = []
        for path, own in family.linears.items():
            try:
                linear: Any = linear_at(layer, path)
            except AttributeError as error:
                raise UserError(
                    f"layer {number} of {type(language_model).__name__} has no {path}, which HOSTS "
                    f"in vlm/hosts.py names for {config.model_type!r}; mend the entry"
                ) from error
            bias = linear.bias is not None
            linears.append(HostLinear(path, own, linear.in_features, linear.out_features, bias))
        layers.append(tuple(linears))
    into_o = next(x.in_dim for x in layers[0] if "o" in x.roles)  # all heads side by side
    return HostShape(
        model_type=config.model_type,
        hidden_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_dim=into_o // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        layers=tuple(layers),
    )
