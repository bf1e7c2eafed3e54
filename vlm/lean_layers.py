"""Which layers of a language model learn leaner than their classes have it?

On a CPU feed-forward layers (`vlm/gated_mlp.py`) and norms (`vlm/rms_norm.py`), of the families
whose layers are known. They are asked in every call whether they are plain: adapters, quantised and
sharded weights, lower precision and everything without gradients go the way of their own classes.

On a GPU nothing is changed: fused kernels are Liger's (`use_liger_kernel: true`).
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from connectors.fusion import Role
from vlm.gated_mlp import GatedParts, gated_mlp
from vlm.hosts import HOSTS, HostFamily, decoder_layers
from vlm.rms_norm import rms_norm

ROLES: tuple[Role, ...] = ("gate", "up", "down")


def learn_lean(language_model: PreTrainedModel) -> None:
    """Let the layers of a bare language model learn leaner; it stays the same to all else."""
    family = HOSTS.get(language_model.config.model_type)
    if family is None:
        return
    for module in language_model.modules():
        if _is_rms_norm(module):
            _replace(module, _norm_forward)
    for layer in decoder_layers(language_model):
        mlp = _gated_of(layer, family)
        if mlp is not None:
            _replace(mlp, _gated_forward)


def learn_as_usual(language_model: PreTrainedModel) -> None:
    """Take back what `learn_lean` did."""
    for module in language_model.modules():
        own = vars(module).get("forward")
        if isinstance(own, MethodType) and own.__func__ in (_gated_forward, _norm_forward):
            del module.forward


def _replace(module: nn.Module, forward: Any) -> None:
    """Give a module another forward; a bound method, which copies along with it."""
    module.forward = MethodType(forward, module)


def _is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is built as Llama's norm; Gemma's calls its eps otherwise."""
    return set(module._parameters) == {"weight"} and "variance_epsilon" in vars(module)


def _gated_of(layer: nn.Module, family: HostFamily) -> nn.Module | None:
    """Return a decoder layer's gated feed-forward layer, None where gate and up are one matrix."""
    paths = {roles[0]: path for path, roles in family.linears.items() if len(roles) == 1}
    if not set(ROLES) <= set(paths):
        return None
    places = {role: paths[role].rpartition(".") for role in ROLES}
    (path,) = {place for place, _, _ in places.values()}
    mlp = layer.get_submodule(path)
    names = {name for _, _, name in places.values()}
    return mlp if set(mlp._modules) == {*names, "act_fn"} else None


def _learns(x: Tensor, weight: Tensor) -> bool:
    """Return whether gradients are taken, in one type of numbers."""
    one_type = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled() and one_type


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    """Return what the layer makes of (B, L, E)."""
    parts = GatedParts(self.gate_proj, self.up_proj, self.down_proj, self.act_fn)
    if parts.are_plain() and _learns(x, self.gate_proj.weight):
        return gated_mlp(x, parts)
    return type(self).forward(self, x)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Return what the norm makes of (..., E)."""
    weight = self.weight
    plain = type(weight) is nn.Parameter and weight.shape == hidden_states.shape[-1:]
    unhooked = not (self._forward_pre_hooks or self._forward_hooks or self._backward_hooks)
    in_cpu = weight.dtype == torch.float32 and weight.device.type in ("cpu", "meta")
    if plain and unhooked and in_cpu and _learns(hidden_states, weight):
        return rms_norm(hidden_states, weight, self.variance_epsilon)
    return type(self).forward(self, hidden_states)
