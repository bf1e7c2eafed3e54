"""How do connectors get at a language model's layers without changing its modules and names?

Forward hooks. The weights stay the connector's, so the language model's checkpoint, PEFT's target
names and the freeze plan are as without it.

Surprises:
- The context goes as a keyword argument through the model into each decoder layer and its
  attention, where a hook takes it out. A gradient-checkpointed layer is computed again with the
  arguments it had, so it meets its own context, whatever was computed in between.
- transformers checkpoints a layer's `forward`, not its hooks: what they compute before and after
  the layer is checkpointed here.
- Hooks are objects, not closures, so that a deep copy of the model gets its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from connectors.chain import ConnectorChain
from connectors.fusion import FusionContext, Where
from connectors.token_routed_linear import add_rows, join_rows, other_rows
from vlm.hosts import HostFamily, decoder_layers, family_of, linear_at

ARGUMENT = "fusion_call"


class FusionCall:
    """What goes through the layers: the chain whose weights are used, and the context."""

    def __init__(self, chain: ConnectorChain, context: FusionContext) -> None:
        self.chain = chain
        self.context = context


class LayerSlot:
    """The call that one decoder layer is in, for the hooks inside it."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.clear()

    def clear(self) -> None:
        """Forget the call."""
        self.call: FusionCall | None = None
        self.residual: Tensor | None = None
        self.rest: Tensor | None = None
        self.whole: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin outside any call."""
        return {"layer": self.layer, "call": None, "residual": None, "rest": None, "whole": None}


class AtLayer:
    """Before or after a decoder layer: hidden states pass through the chain."""

    def __init__(self, slot: LayerSlot, where: Where) -> None:
        self.slot = slot
        self.where: Where = where

    def __call__(self, layer: Any, args: tuple, kwargs: dict[str, Any], *output: Any) -> Any:
        """Serve as forward pre-hook, or as forward hook."""
        if self.where == "after":
            self.slot.clear()
        call = kwargs.get(ARGUMENT)
        if call is None or (self.slot.layer, self.where) not in call.chain.layer_places:
            return None
        if self.where == "before":
            return (self._apply(layer, call, args[0]), *args[1:]), kwargs
        if isinstance(output[0], tuple):  # modelling files that come with their weights
            return (self._apply(layer, call, output[0][0]), *output[0][1:])
        return self._apply(layer, call, output[0])

    def _apply(self, layer: Any, call: FusionCall, hidden: Tensor) -> Tensor:
        """Return what the chain makes of hidden states (B, L, E)."""

        def run(hidden: Tensor) -> Tensor:
            return call.chain.apply_layer(self.slot.layer, self.where, hidden, call.context)

        saves = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        if saves and layer.training and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False)  # pyright: ignore
        return run(hidden)


class EnterAttention:
    """At a layer's attention, which runs before its linear layers: take the call out."""

    def __init__(self, slot: LayerSlot) -> None:
        self.slot = slot

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Serve as forward pre-hook."""
        self.slot.call = kwargs.pop(ARGUMENT, None)
        return args, kwargs


class KeepResidual:
    """At the module that begins the attention branch: remember what the residual path keeps."""

    def __init__(self, slot: LayerSlot) -> None:
        self.slot = slot

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Serve as forward pre-hook."""
        self.slot.residual = args[0] if args else kwargs["hidden_states"]


class AfterAttention:
    """At the end of the attention branch: add what the chain adds to residual plus branch."""

    def __init__(self, slot: LayerSlot) -> None:
        self.slot = slot

    def __call__(self, _: nn.Module, args: tuple, output: Any) -> Any:
        """Serve as forward hook."""
        call, residual = self.slot.call, self.slot.residual
        place: tuple[int, Where] = (self.slot.layer, "after_attention")
        if call is None or place not in call.chain.layer_places:
            return None
        assert residual is not None, "attention_start of the family in HOSTS runs before"
        branch = output[0] if isinstance(output, tuple) else output
        hidden = call.chain.apply_layer(*place, residual + branch, call.context)
        branch = hidden - residual
        return (branch, *output[1:]) if isinstance(output, tuple) else branch


class AtLinear:
    """At a linear layer: chosen tokens get something added, or another layer altogether."""

    def __init__(self, slot: LayerSlot, name: str) -> None:
        self.slot, self.name = slot, name

    def before(self, linear: nn.Module, args: tuple) -> Any:
        """Keep replaced tokens from the linear layer: it sees the others, (rest, in)."""
        call, x = self.slot.call, args[0]
        self.slot.whole = None
        if call is None:
            return None
        for part, _ in call.chain.linear_parts(self.slot.layer, self.name):
            if part.replaces_linear:
                rows = part.linear_rows(call.context).to(x.device)
                flat = x.flatten(0, -2)
                self.slot.whole, self.slot.rest = x, other_rows(rows, len(flat))
                return (flat.index_select(0, self.slot.rest),)
        return None

    def after(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Add or put in what the connector makes of its tokens."""
        call, slot = self.slot.call, self.slot
        if call is None:
            return None
        x = args[0] if slot.whole is None else slot.whole
        flat, result = x.flatten(0, -2), output.flatten(0, -2)
        for part, site in call.chain.linear_parts(slot.layer, self.name):
            rows = part.linear_rows(call.context).to(x.device)
            if len(rows) == 0 and not call.context.run_all and not part.replaces_linear:
                continue
            own = part.linear_apply(site, flat.index_select(0, rows))
            if part.replaces_linear:
                assert slot.rest is not None
                result = join_rows(result, slot.rest, own, rows)
            else:
                result = add_rows(result, own, rows)
        slot.rest = slot.whole = None
        return result.unflatten(0, x.shape[:-1])


class FusionHooks:
    """The hooks of one language model, put on when a module lacks them.

    That is asked in every call: quantisation and PEFT replace modules.
    """

    def __init__(self) -> None:
        self._slots: list[LayerSlot] = []
        self._hooked: dict[tuple[int, str], nn.Module] = {}

    def attach(self, language_model: PreTrainedModel, chain: ConnectorChain) -> None:
        """Put hooks on all modules that the chain's places need."""
        family, layers = family_of(language_model), decoder_layers(language_model)
        for number in range(len(self._slots), len(layers)):
            self._slots.append(LayerSlot(number))
        for number, layer in enumerate(layers):
            self._attach_layer(number, layer, family, chain)
        for number, name in chain.linear_places:
            linear = linear_at(layers[number], name)
            if self._is_new((number, name), linear):
                hook = AtLinear(self._slots[number], name)
                linear.register_forward_pre_hook(hook.before)
                linear.register_forward_hook(hook.after)

    def _attach_layer(
        self, number: int, layer: nn.Module, family: HostFamily, chain: ConnectorChain
    ) -> None:
        slot = self._slots[number]
        if self._is_new((number, ""), layer):
            layer.register_forward_pre_hook(AtLayer(slot, "before"), with_kwargs=True)
            layer.register_forward_hook(AtLayer(slot, "after"), with_kwargs=True)
            attention = layer.get_submodule(family.attention)
            attention.register_forward_pre_hook(EnterAttention(slot), with_kwargs=True)
        if (number, "after_attention") in chain.layer_places:
            end = layer.get_submodule(family.attention_end)
            if self._is_new((number, "after_attention"), end):
                start = layer.get_submodule(family.attention_start)
                start.register_forward_pre_hook(KeepResidual(slot), with_kwargs=True)
                end.register_forward_hook(AfterAttention(slot))

    def _is_new(self, place: tuple[int, str], module: nn.Module) -> bool:
        """Return whether the module at a place is another than the one with hooks."""
        if self._hooked.get(place) is module:
            return False
        self._hooked[place] = module
        return True
