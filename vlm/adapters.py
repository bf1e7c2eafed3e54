"""How does a language model learn by low-rank weights beside its own, which stay as they are?

LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353), by PEFT. The language model's linear layers get
them; its embedding and head, the vision tower and the connector never do.

Surprises:
- The model stays what it was, a `VlmForConditionalGeneration`; its layers are what changes.
- Beside `partial_lora` the adapter adds its product at every token, and the connector its own at
  image tokens. What a `visual_expert` puts in a layer's place would get the adapter's product too,
  but not once it is merged, and DoRA would rescale what either adds; both are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from connectors import replaces_linears, stands_beside_linears
from connectors.config import check_positive
from vlm.errors import UserError

ROOT = "model.language_model"
ALL = "all-linear"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What stands beside the language model's linear layers; the defaults are LLaVA-1.5's.

    Attributes:
        type: a product of two small matrices.
        rank: width between the two.
        alpha: the product is scaled by alpha / rank.
        dropout: share of a layer's inputs that is dropped before the product, in training.
        dora: also learn the length of each row of a layer's weight.
        targets: all linear layers, or the last names of some, such as [q_proj, v_proj].
    """

    type: Literal["lora"] = "lora"
    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    dora: bool = False
    targets: Literal["all-linear"] | list[str] = ALL

    def __post_init__(self) -> None:
        check_positive("adapter", rank=self.rank, alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter: dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.targets:
            raise UserError(f"adapter: targets names no layer; leave it out for {ALL}")


def check_beside(connector: Any, adapter: AdapterConfig) -> None:
    """Refuse an adapter on layers to which a connector does something that would not merge.

    Args:
        connector: the model's `connector_config`.
        adapter: what is to stand beside the same layers.

    Raises:
        UserError: the sentence says what to change.
    """
    if replaces_linears(connector):
        raise UserError(
            "the connector puts layers of its own in place of the language model's linear layers "
            "at image tokens, so an adapter beside these could not be merged; train without one"
        )
    if adapter.dora and stands_beside_linears(connector):
        raise UserError(
            "the connector adds to the language model's linear layers, which dora would rescale; "
            "set adapter.dora to false"
        )


def linear_names(language_model: nn.Module) -> list[str]:
    """Return the paths of a bare language model's linear layers, before it has an adapter."""
    return [name for name, each in language_model.named_modules() if isinstance(each, nn.Linear)]


def choose_linears(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """Return those of the linear layers that are targets.

    Args:
        names: paths of all linear layers, such as layers.0.self_attn.q_proj.
        targets: "all-linear", or last names such as q_proj or self_attn.q_proj.

    Raises:
        UserError: there is no linear layer, or none of a target's name.
    """
    if not names:
        raise UserError("the language model has no linear layers (torch.nn.Linear) to adapt")
    if targets == ALL:
        return list(names)
    chosen = {target: [n for n in names if f".{n}".endswith(f".{target}")] for target in targets}
    known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    for target, found in chosen.items():
        if not found:
            raise UserError(
                f"adapter: targets names {target!r}, but no linear layer of the language model is "
                f"called so; its linear layers are {known}"
            )
    wanted = {name for found in chosen.values() for name in found}
    return [name for name in names if name in wanted]


def add_adapter(model: Any, adapter: AdapterConfig) -> None:
    """Put new low-rank weights beside the language model's linear layers; they change nothing yet.

    Args:
        model: a VlmForConditionalGeneration, quantised or not.
        adapter: which layers, how large.

    Raises:
        UserError: the connector or the targets do not allow it.
    """
    from peft import LoraConfig

    check_beside(model.config.connector_config, adapter)
    names = choose_linears(linear_names(model.model.language_model), adapter.targets)
    wanted = [f"{ROOT}.{name}" for name in names]
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    inject(model, settings)
    found = adapted_linears(model)
    assert sorted(found) == sorted(wanted), "PEFT adapted other layers than it was told"


def inject(model: Any, settings: Any) -> None:
    """Put in what PEFT's `settings` say; its weights are float32, whatever the model's type."""
    model.add_adapter(settings)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def adapted_linears(model: nn.Module) -> list[str]:
    """Return the full names of the layers that have an adapter, whatever part they belong to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)]


def is_adapter(name: str) -> bool:
    """Return whether a parameter of a model belongs to the language model's adapter."""
    inside = name.startswith(f"{ROOT}.")
    return inside and any(word.startswith("lora_") for word in name.split("."))


def adapter_weights(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's weights of a model's state, under PEFT's names for files."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, dict(state), save_embedding_layers=False)


def own_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under a model's own names; the adapter's have PEFT's names for files."""
    marks = {name: torch.empty(0) for name in model.state_dict() if is_adapter(name)}
    if not marks:
        return dict(weights)
    names = {id(mark): name for name, mark in marks.items()}
    published = {name: names[id(m)] for name, m in adapter_weights(model, marks).items()}
    return {published.get(name, name): tensor for name, tensor in weights.items()}


@torch.no_grad()
def merge_adapter(model: Any) -> None:
    """Add the adapter's product to the weights that it stands beside, and take it away.

    Args:
        model: with an adapter, and no longer quantised.

    Raises:
        UserError: a merged weight is no number.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                raise UserError(f"the adapter beside {name} cannot be merged: {error}") from error
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
