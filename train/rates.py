"""At which rate does each part of a stage learn, which of its layers, and from which step on?

    trainable:
      connector: 1e-3
      language_model: {learning_rate: 2e-5, layers: "16-", layer_decay: 0.9, weight_decay: 0.05}
    changes:
      - {at_step: 1000, trainable: {connector: 1e-4, vision_tower: 2e-6}}

A change replaces the whole of `trainable`: a part that it does not name is frozen from there on.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from connectors.config import config_from_mapping
from connectors.registry import lookup
from vlm.errors import UserError

LAYERED = ("vision_tower", "language_model")  # the parts whose layers can be named


@dataclass(frozen=True, kw_only=True)
class PartRates:
    """How a part learns.

    Attributes:
        learning_rate: the peak, which the stage's schedule multiplies.
        layers: which layers train: "16-" from the 17th on and what comes after them (the last norm
            and the head), [16, 24] the 17th to 24th alone; all and what is around them if None.
        layer_decay: the rate is multiplied by it once for every step down from what comes after the
            last layer: d for the last layer, d^N for the first of N, d^(N + 1) for embeddings, as
            BEiT and Qwen-VL have it.
        weight_decay: instead of `training.weight_decay`; norms and biases never decay.
    """

    learning_rate: float
    layers: str | list[int] | None = None
    layer_decay: float = 1.0
    weight_decay: float | None = None

    @property
    def by_layer(self) -> bool:
        """Whether it matters in which layer a parameter stands."""
        return self.layers is not None or self.layer_decay != 1.0

    def rate_at(self, depth: int, num_layers: int) -> float | None:
        """Return the peak rate of what stands at a depth, None where it does not train.

        Args:
            depth: 0 below the layers (embeddings), 1 to `num_layers` in them, one more above.
            num_layers: how many layers the part has.

        Raises:
            UserError: the range of layers goes beyond them.
        """
        if self.layers is not None:
            first, stop = _span(self.layers)
            if max(first + 1, stop or 0) > num_layers:
                raise UserError(
                    f"layers {self.layers!r} go beyond the model, whose {num_layers} layers are "
                    f"counted from 0 to {num_layers - 1}"
                )
            if depth <= first or (stop is not None and depth > stop):
                return None
        return self.learning_rate * self.layer_decay ** (num_layers + 1 - depth)


Trainable = Mapping[str, float | PartRates]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What trains, and how fast, once `at_step` optimizer steps of the stage are done."""

    at_step: int
    trainable: dict[str, float | PartRates]


def part_rates(value: float | PartRates) -> PartRates:
    """Return a part's rates, also where the recipe has a learning rate alone."""
    return value if isinstance(value, PartRates) else PartRates(learning_rate=value)


def _span(layers: str | list[int]) -> tuple[int, int | None]:
    """Return (first, stop) of a checked range; stop None: to the end and beyond."""
    if isinstance(layers, str):
        return int(layers.removesuffix("-")), None
    return layers[0], layers[1]


def parse_trainable(
    value: Any, where: str, parts: Mapping[str, Any]
) -> dict[str, float | PartRates]:
    """Check a stage's `trainable`; `parts` are those a model can have.

    Raises:
        UserError: a part, field or value is wrong; the sentence begins with `where`.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping, not {value!r}")
    rates: dict[str, float | PartRates] = {}
    for part, given in value.items():
        try:
            lookup("part", part, parts)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        place = f"{where}.{part}"
        if isinstance(given, (Mapping, PartRates)):
            rates[part] = _parse_part(given, part, place)
        else:
            rates[part] = _learning_rate(given, place)
    if not rates:
        raise UserError(f"{where} names no part, so nothing would train; parts: {', '.join(parts)}")
    return rates


def _parse_part(given: Any, part: str, place: str) -> PartRates:
    """Check the mapping of one part."""
    rates = config_from_mapping(PartRates, given, place)
    _learning_rate(rates.learning_rate, f"{place}.learning_rate")
    if rates.by_layer and part not in LAYERED:
        raise UserError(
            f"{place}: layers and layer_decay are for {' and '.join(LAYERED)}, not for {part}"
        )
    if not 0 < rates.layer_decay <= 1:
        raise UserError(
            f"{place}.layer_decay must be above 0 and at most 1, not {rates.layer_decay:g}"
        )
    if rates.weight_decay is not None and rates.weight_decay < 0:
        raise UserError(f"{place}.weight_decay must be 0 or more, not {rates.weight_decay:g}")
    if rates.layers is not None and not _is_range(rates.layers):
        raise UserError(
            f'{place}.layers must be a range such as "16-" (from layer 16 on) or [16, 24] (16 to '
            f"23), counted from 0, not {rates.layers!r}"
        )
    return rates


def _is_range(layers: str | list[int]) -> bool:
    if isinstance(layers, str):
        return re.fullmatch(r"\d+-", layers) is not None
    return len(layers) == 2 and 0 <= layers[0] < layers[1]


def _learning_rate(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{place} must be a learning rate such as 1e-3, not {value!r}")
    return float(value)


def parse_changes(value: Any, where: str, parts: Mapping[str, Any]) -> list[Change]:
    """Check a stage's `changes`, which come in the order of their steps.

    Raises:
        UserError: one of them is wrong; the sentence begins with `where`.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(
            f"{where} must be a list such as [{{at_step: 1000, trainable: {{connector: 1e-4}}}}], "
            f"not {value!r}"
        )
    changes: list[Change] = []
    for number, item in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(item, Mapping):
            raise UserError(f"{place} must be a mapping with at_step and trainable, not {item!r}")
        values = dict(item)
        if "trainable" in values:
            values["trainable"] = parse_trainable(values["trainable"], f"{place}.trainable", parts)
        change = config_from_mapping(Change, values, place)
        earliest = changes[-1].at_step + 1 if changes else 1
        if change.at_step < earliest:
            raise UserError(f"{place}.at_step must be {earliest} or more, not {change.at_step}")
        changes.append(change)
    return changes


def check_steps(changes: Sequence[Change], steps: int, where: str) -> None:
    """Refuse a change that the stage would end before.

    Raises:
        UserError: the last change comes at the stage's last step or later.
    """
    if changes and changes[-1].at_step >= steps:
        raise UserError(
            f"{where}.changes: at_step {changes[-1].at_step} is never reached, the stage has "
            f"{steps} steps"
        )
