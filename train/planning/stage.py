"""What does one stage of a recipe cost, as it stands and with other settings?"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from train.adapted import trained_beside
from train.freeze import freeze
from train.planning.lengths import Lengths
from train.planning.memory import (
    Bytes,
    Memory,
    Sharding,
    lora_parameters,
    model_states,
    with_activations,
)
from train.planning.on_base import put_on_base, state_bytes
from train.planning.settings import StageSettings, bytes_per_parameter
from train.planning.skeleton import Skeleton, count_parts, hollow_model, largest_layer
from train.planning.step import Pack, Sample, StepCost, rehearse
from train.recipe import StageRecipe, with_place
from vlm.adapters import is_adapter
from vlm.lean_layers import learn_as_usual, learn_lean
from vlm.lm_head import usual_chunk_elements
from vlm.quantization import Quantization

LORA_RANK = 128  # LLaVA-1.5's finetune_lora.sh


@dataclass(frozen=True)
class Setup:
    """What can be changed when a stage does not fit."""

    checkpointing: bool
    rows: int  # of a micro-batch
    accumulation: int
    sharding: Sharding
    quantization: Quantization | None = None
    lora: bool = False  # in place of a language model that trains in full


@dataclass
class StageCosts:
    """Costs of one stage; what was rehearsed is remembered.

    Attributes:
        skeleton: the recipe's model.
        stage: decides what trains.
        settings: its arguments.
        lengths: its rows.
        dtype: of the recipe's weights.
        quantization: of the recipe's language model.
        gpus: how many.
        reserve: bytes of a GPU that are taken before anything is stored; 0: it is a CPU.
    """

    skeleton: Skeleton
    stage: StageRecipe
    settings: StageSettings
    lengths: Lengths
    dtype: str
    quantization: Quantization | None
    gpus: int
    reserve: int
    _models: dict[Quantization | None, Any] = field(default_factory=dict)
    _known: dict[Any, StepCost] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.skeleton.model.config.text_config.hidden_size

    def model(self, quantization: Quantization | None) -> Any:
        """Return the stage's model, what trains in it requiring gradients."""
        adapter = self.stage.adapter
        if quantization is None and adapter is None:
            model = self.skeleton.model  # also other stages'
        elif quantization in self._models:
            return self._models[quantization]
        else:
            config: Any = self.skeleton.model.config
            model = self._models[quantization] = hollow_model(config)
            compute_dtype = getattr(torch, self.settings.lower or self.dtype)
            autocast = self.settings.lower is not None
            put_on_base(model, adapter, quantization, compute_dtype, autocast)
        # All trains that trains at any time of the stage: its changes come one by one.
        first, *later = self.stage.phases
        with_place(f"stages.{self.stage.name}", freeze, model, first, later)
        return model

    @cached_property
    def trained(self) -> dict[str, int]:
        """Part -> parameters that train."""
        parts = count_parts(self.model(self.quantization), trained_only=True)
        return {part: n for part, n in parts.items() if n}

    @cached_property
    def adapter_size(self) -> int:
        """Parameters of the stage's adapter."""
        named = self.model(self.quantization).named_parameters()
        return sum(parameter.numel() for name, parameter in named if is_adapter(name))

    def setup(self) -> Setup:
        """Return the recipe's own."""
        settings, layer = self.settings, largest_layer(self.skeleton.model)
        return Setup(
            settings.checkpointing,
            settings.micro_batch,
            settings.accumulation,
            settings.sharding(self.gpus, self.hidden_size, layer),
            self.quantization,
        )

    def cost(self, sample: Sample | Pack, setup: Setup) -> StepCost:
        """Return the cost of a micro-batch of equal rows."""
        cast = setup.sharding.engine != "ddp"  # weights are cast before; else where they are used
        key = (sample, setup.rows, setup.checkpointing, setup.quantization, cast)
        if key not in self._known:
            model = self.model(setup.quantization)
            self._set_types(model, cast)
            if setup.checkpointing:
                model.activation_checkpointing_enable(
                    {"keep": "products"} if self.settings.keeps_products else None
                )
            else:
                model.activation_checkpointing_disable()
            lower = self.settings.lower
            autocast = getattr(torch, lower) if lower and not cast else None
            gpu, packed = self.reserve > 0, bool(self.stage.packed)
            # a stage beside this one may have the same model
            learns = learn_as_usual if gpu or autocast is not None else learn_lean
            learns(model.model.language_model)
            model.chunk_elements = usual_chunk_elements(gpu)
            self._known[key] = rehearse(model, sample, setup.rows, packed, autocast, gpu)
        return self._known[key]

    def _set_types(self, model: Any, cast: bool) -> None:
        """Give a model the types in which it is trained, `cast` by an engine or not."""
        lower = self.settings.lower
        model.to(getattr(torch, lower if lower and cast else self.dtype))
        if self._on_base(model) and not cast:
            beside = tuple(trained_beside(self.stage))
            for name, parameter in model.named_parameters():
                if is_adapter(name) or name.startswith(beside):
                    parameter.data = parameter.data.float()

    def _on_base(self, model: Any) -> bool:
        """Return whether what trains is kept in float32, apart from a base."""
        return model is not self.skeleton.model

    def memory(self, setup: Setup, sample: Sample | Pack | None = None) -> Memory:
        """Return a GPU's memory at the longest row, or at `sample`."""
        cost = self.cost(sample or self.lengths.longest, setup)
        states = self._states(setup)
        stay = setup.accumulation > 1 or setup.sharding.engine != "ddp"
        return with_activations(states, cost.activations, cost.with_gradients, stay, self.reserve)

    def _states(self, setup: Setup) -> Memory:
        """Return what model and optimizer keep."""
        engine = setup.sharding.engine
        model = self.model(setup.quantization)
        frozen_type = bytes_per_parameter(self.dtype, self.settings, engine).weight
        trained, frozen, size = state_bytes(model, int(frozen_type))
        dtype = "float32" if self._on_base(model) else self.dtype
        per: Bytes = bytes_per_parameter(dtype, self.settings, engine)
        if setup.lora:
            added = lora_parameters(self.linears(), LORA_RANK)
            frozen += self.trained["language_model"]
            trained += added - self.trained["language_model"]
            size = frozen_type
        return model_states(trained, frozen, replace(per, frozen=size), setup.sharding)

    def linears(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the linear layers of the language model's layers."""
        layers = self.skeleton.model.model.language_model
        return [
            (module.in_features, module.out_features)
            for module in layers.modules()
            if isinstance(module, nn.Linear)
        ]
