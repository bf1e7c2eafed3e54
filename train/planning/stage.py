"""What does one stage of a recipe cost, as it stands and with other settings?"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

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
from train.planning.settings import StageSettings, bytes_per_parameter
from train.planning.skeleton import Skeleton, count_parts, largest_layer
from train.planning.step import Sample, StepCost, rehearse
from train.recipe import StageRecipe, with_place

LORA_RANK = 128  # LLaVA-1.5's finetune_lora.sh


@dataclass(frozen=True)
class Setup:
    """What can be changed when a stage does not fit."""

    checkpointing: bool
    rows: int  # of a micro-batch
    accumulation: int
    sharding: Sharding
    lora: bool = False


@dataclass
class StageCosts:
    """Costs of one stage; what was rehearsed is remembered.

    Attributes:
        skeleton: the recipe's model.
        stage: decides what trains.
        settings: its arguments.
        lengths: its rows.
        dtype: of the recipe's weights.
        gpus: how many.
        reserve: bytes of a GPU that are taken before anything is stored.
    """

    skeleton: Skeleton
    stage: StageRecipe
    settings: StageSettings
    lengths: Lengths
    dtype: str
    gpus: int
    reserve: int
    _known: dict[Any, StepCost] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.skeleton.model.config.text_config.hidden_size

    @cached_property
    def trained(self) -> dict[str, int]:
        """Part -> parameters that train."""
        self._freeze()
        parts = count_parts(self.skeleton.model, trained_only=True)
        return {part: n for part, n in parts.items() if n}

    def _freeze(self) -> None:
        """Let all train that trains at any time of the stage: its changes come one by one."""
        first, *later = self.stage.phases
        with_place(f"stages.{self.stage.name}", freeze, self.skeleton.model, first, later)

    def setup(self) -> Setup:
        """Return the recipe's own."""
        settings, layer = self.settings, largest_layer(self.skeleton.model)
        return Setup(
            settings.checkpointing,
            settings.micro_batch,
            settings.accumulation,
            settings.sharding(self.gpus, self.hidden_size, layer),
        )

    def cost(self, sample: Sample, setup: Setup) -> StepCost:
        """Return the cost of a micro-batch of equal samples."""
        cast = setup.sharding.engine != "ddp"  # weights are cast before; else where they are used
        key = (sample, setup.rows, setup.checkpointing, cast)
        if key not in self._known:
            lower = self.settings.lower
            model = self.skeleton.model
            model.to(getattr(torch, lower if lower and cast else self.dtype))
            self._freeze()
            if setup.checkpointing:
                model.activation_checkpointing_enable()
            else:
                model.activation_checkpointing_disable()
            autocast = getattr(torch, lower) if lower and not cast else None
            packed = bool(self.stage.packed)  # rows filled to a length are refused before
            self._known[key] = rehearse(model, sample, setup.rows, packed, autocast)
        return self._known[key]

    def memory(self, setup: Setup, sample: Sample | None = None) -> Memory:
        """Return a GPU's memory at the longest row, or at `sample`."""
        cost = self.cost(sample or self.lengths.longest, setup)
        states = self._states(setup)
        stay = setup.accumulation > 1 or setup.sharding.engine != "ddp"
        return with_activations(states, cost.activations, cost.with_gradients, stay, self.reserve)

    def _states(self, setup: Setup) -> Memory:
        """Return what model and optimizer keep."""
        per: Bytes = bytes_per_parameter(self.dtype, self.settings, setup.sharding.engine)
        trained, total = sum(self.trained.values()), sum(self.skeleton.parameters.values())
        if setup.lora:
            added = lora_parameters(self.linears(), LORA_RANK)
            trained += added - self.trained["language_model"]
            total += added
        return model_states(trained, total - trained, per, setup.sharding)

    def linears(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the linear layers of the language model's layers."""
        layers = self.skeleton.model.model.language_model
        return [
            (module.in_features, module.out_features)
            for module in layers.modules()
            if isinstance(module, nn.Linear)
        ]
