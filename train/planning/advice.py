"""What should change when a stage does not fit? The cheapest first, until it fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from train.planning.memory import Memory
from train.planning.settings import deepspeed
from train.planning.stage import LORA_RANK, Setup, StageCosts
from vlm.errors import UserError
from vlm.quantization import linears_to_quantize


@dataclass(frozen=True)
class Advice:
    """One change, on top of those before it, and the memory that follows."""

    change: str
    price: str
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Change:
    """A setup to try, how to get it, and what it costs."""

    setup: Setup
    how: str
    price: str


def advise(costs: StageCosts, budget: float) -> list[Advice]:
    """Return what to change until a stage fits into `budget` bytes, cheapest first.

    Empty if it fits as it is, or nothing helps; the last one does not fit if all is not enough.
    """
    setup = costs.setup()
    memory, taken = costs.memory(setup), []
    for changes in CHANGES:
        if memory.total <= budget:
            break
        tried = [(change, costs.memory(change.setup)) for change in changes(setup, costs)]
        helping = [(change, after) for change, after in tried if after.total < memory.total]
        fitting = [(change, after) for change, after in helping if after.total <= budget]
        if helping:
            change, memory = fitting[0] if fitting else helping[-1]
            setup = change.setup
            taken.append(Advice(change.how, change.price, memory, bool(fitting)))
    return taken


def _checkpointing(setup: Setup, _: StageCosts) -> list[Change]:
    if setup.checkpointing:
        return []
    new = replace(setup, checkpointing=True)
    return [Change(new, "gradient_checkpointing: true", "most of a second forward pass")]


def _micro_batch(setup: Setup, _: StageCosts) -> list[Change]:
    """Return halves, quarters and so on of the micro-batch; the global batch stays."""
    changes, rows, accumulation = [], setup.rows, setup.accumulation
    while rows % 2 == 0:
        rows, accumulation = rows // 2, accumulation * 2
        new = replace(setup, rows=rows, accumulation=accumulation)
        how = f"per_device_train_batch_size: {rows}, gradient_accumulation_steps: {accumulation}"
        changes.append(Change(new, how, "smaller matrix products"))
    return changes


def _quantize(setup: Setup, costs: StageCosts) -> list[Change]:
    """Return 4 bits for weights that an adapter leaves as they are; engines cannot cut these."""
    adapted = costs.stage.adapter is not None
    if not adapted or setup.quantization is not None or setup.sharding.engine != "ddp":
        return []
    try:
        linears_to_quantize(costs.skeleton.model, "nf4")
    except UserError:
        return []  # it says what this model lacks; here it is one offer less
    new = replace(setup, quantization="nf4")
    return [Change(new, "model.quantization: nf4", "making weights whole at every use")]


def _level(setup: Setup, costs: StageCosts) -> list[Change]:
    """Return the ZeRO levels above this one; one GPU has nobody to share with."""
    if costs.gpus == 1 or setup.quantization is not None:
        return []
    prices = {
        1: "next to nothing",
        2: "next to nothing",
        3: "gathering the weights, twice a micro-batch",
    }
    return [
        Change(
            replace(setup, sharding=deepspeed(costs.gpus, costs.hidden_size, level)),
            f"deepspeed with ZeRO-{level}",
            prices[level],
        )
        for level in range(setup.sharding.level + 1, 4)
    ]


def _offload(setup: Setup, costs: StageCosts) -> list[Change]:
    if setup.quantization is not None:
        return []
    least = max(2, setup.sharding.level)
    offers = {
        "offload_optimizer": (least, True, False),
        "offload_optimizer and offload_param": (3, True, True),
    }
    return [
        Change(
            replace(setup, sharding=deepspeed(costs.gpus, costs.hidden_size, *offer)),
            f"deepspeed with ZeRO-{offer[0]} and {name}",
            "traffic to the host in every step, often most of its time",
        )
        for name, offer in offers.items()
    ]


def _lora(setup: Setup, costs: StageCosts) -> list[Change]:
    if "language_model" not in costs.trained or costs.stage.adapter is not None:
        return []
    how = f"adapter: {{rank: {LORA_RANK}}}, LoRA in place of training the language model"
    return [Change(replace(setup, lora=True), how, "another result")]


CHANGES: tuple[Callable[[Setup, StageCosts], list[Change]], ...] = (
    _checkpointing,
    _micro_batch,
    _quantize,
    _level,
    _offload,
    _lora,
)
