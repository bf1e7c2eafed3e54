"""How does the last decoder layer leave out tokens from which nothing is learnt?

A loss looks at the hidden states of supervised tokens alone. In the last layer the linear layer
behind attention and the feed-forward layer go token by token, so of the other tokens, images' and
prompts', nobody asks what they make. They see the supervised rows, and the residual path has zeros
added elsewhere: with 12 layers and an eighth of the tokens supervised, 7 % of a step's operations.

The rows travel as `vlm/fusion_hooks.py` says: as a keyword argument down to each attention, whose
hook takes it out, so that a checkpointed layer that is computed again meets its own.

Shapes: B batch, L sequence, R supervised rows, E language-model width.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from vlm.hosts import HOSTS, HostFamily, decoder_layers

ARGUMENT = "supervised_rows"


class RowsSlot:
    """What the last layer is in the middle of, for its hooks.

    Attributes:
        rows: (R,) of the B * L tokens that are asked for; None: all.
        shape: (B, L) of what a module was given.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.shape = torch.Size()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin outside any call."""
        return {"rows": None, "shape": torch.Size()}


class TakeRows:
    """At a layer's attention, which runs before its linear layers: take the rows out.

    `slot` is the last layer's; in the others, which see all tokens, it is None.
    """

    def __init__(self, slot: RowsSlot | None) -> None:
        self.slot = slot

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Serve as forward pre-hook."""
        rows = kwargs.pop(ARGUMENT, None)
        if self.slot is not None:
            self.slot.rows = rows
        return args, kwargs


class RowByRow:
    """At a module that goes token by token: let it see the rows alone.

    `ends` says that it is the layer's last, behind which nobody asks for rows any more.
    """

    def __init__(self, slot: RowsSlot, ends: bool) -> None:
        self.slot = slot
        self.ends = ends

    def before(self, _: nn.Module, args: tuple) -> Any:
        """Serve as forward pre-hook: (B, L, C) becomes (1, R, C)."""
        if self.slot.rows is None:
            return None
        self.slot.shape = args[0].shape[:-1]
        rows = self.slot.rows.to(args[0].device)
        return (args[0].flatten(0, -2).index_select(0, rows)[None],)

    def after(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Serve as forward hook: (1, R, E) becomes (B, L, E) with zeros in the other rows."""
        if self.slot.rows is None:
            return None
        rows, shape = self.slot.rows.to(output.device), self.slot.shape
        if self.ends:
            self.slot.rows = None
        flat = output.new_zeros(shape.numel(), output.shape[-1])
        return flat.index_copy(0, rows, output[0]).unflatten(0, shape)


class LastLayer:
    """The hooks of one language model, put on when a module lacks them.

    That is asked in every call: quantisation and PEFT replace modules.
    """

    def __init__(self) -> None:
        self._slot = RowsSlot()
        self._hooked: dict[str, tuple[nn.Module, list[RemovableHandle]]] = {}

    def ask(
        self, language_model: PreTrainedModel, learnt: Tensor, options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the keyword argument that asks a language model for some rows alone.

        It is empty where its family is not known, or the caller's `options` show hidden states.

        Args:
            language_model: the bare one.
            learnt: (B, L - 1) whether the loss looks at a position; at the last it never does.
            options: keyword arguments that the language model gets.
        """
        config = language_model.config
        for name, default in (
            ("output_hidden_states", config.output_hidden_states),
            ("output_attentions", config.output_attentions),
        ):
            if options.get(name, default):
                return {}
        if not self._attach(language_model):
            return {}
        return {ARGUMENT: F.pad(learnt, (0, 1)).flatten().nonzero()[:, 0]}

    def _attach(self, language_model: PreTrainedModel) -> bool:
        """Put on hooks; return whether the family of the language model is known."""
        family = HOSTS.get(language_model.config.model_type)
        if family is None:
            return False
        layers = decoder_layers(language_model)
        for number, layer in enumerate(layers):
            slot = self._slot if number == len(layers) - 1 else None
            attention = layer.get_submodule(family.attention)
            if self._is_new(f"{number}", attention):
                take = attention.register_forward_pre_hook(TakeRows(slot), with_kwargs=True)
                self._hooked[f"{number}"] = attention, [take]
        out, mlp = token_wise(family)
        for path in (out, mlp):
            module = layers[-1].get_submodule(path)
            if self._is_new(path, module):
                hook = RowByRow(self._slot, ends=path == mlp)
                before = module.register_forward_pre_hook(hook.before)
                self._hooked[path] = module, [before, module.register_forward_hook(hook.after)]
        return True

    def _is_new(self, place: str, module: nn.Module) -> bool:
        """Return whether the module at a place is another than the one with hooks, which go."""
        known, handles = self._hooked.get(place, (None, []))
        if known is module:
            return False
        for handle in handles:  # the module may live on inside the new one
            handle.remove()
        return True


def token_wise(family: HostFamily) -> tuple[str, str]:
    """Return the paths in a layer of the linear layer behind attention and the feed-forward one."""
    (out,) = (path for path, roles in family.linears.items() if roles == ("o",))
    (down,) = (path for path, roles in family.linears.items() if roles == ("down",))
    return out, down.rpartition(".")[0]
