"""How many bytes does a GPU hold, by ZeRO level and offload? Pure arithmetic on counts.

Model states follow the ZeRO paper (Rajbhandari et al. 2020, section 3 and table 1): AdamW in mixed
precision keeps 2 bytes of weight, 2 of gradient and 12 of optimizer state for each parameter that
trains; level 1 splits the optimizer state over N processes, level 2 the gradients too, level 3 the
weights too. What does not train has weights alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Engine = Literal["ddp", "deepspeed", "fsdp"]

GIB = 2**30
# An assumption: CUDA's context, cuBLAS, NCCL, and blocks the allocator holds but cannot use.
RESERVE = 3 * GIB // 2


@dataclass(frozen=True)
class Bytes:
    """Bytes for each parameter.

    Attributes:
        weight: of a parameter, quantised ones aside.
        gradient: of one that trains.
        master: of its float32 copy, where the weight is of a lower type.
        states: of the optimizer's moments.
        step: what the optimizer's step needs for a moment.
        frozen: the weight of one that does not train; None: as of one that does.
    """

    weight: float
    gradient: float
    master: float
    states: float
    step: float = 0.0
    frozen: float | None = None

    @property
    def trained(self) -> float:
        """All that a parameter keeps while it trains: 16 in the ZeRO paper."""
        return self.weight + self.gradient + self.master + self.states


@dataclass(frozen=True)
class Sharding:
    """How model states are spread over processes.

    Attributes:
        engine: whose; "ddp" keeps everything everywhere.
        gpus: N.
        level: 0 to 3 as in ZeRO; 3 is also what FSDP does.
        offload_optimizer: gradients, float32 weights and moments lie in the host's memory.
        offload_parameters: weights too, fetched when they are needed; level 3 only.
        bucket: elements that are reduced at once, 0 without buckets.
        live: weights that level 3 holds gathered, in elements.
    """

    engine: Engine
    gpus: int
    level: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0
    live: int = 0

    @property
    def name(self) -> str:
        """What a table calls it."""
        if self.engine == "fsdp":
            return "FSDP"
        if not self.level:
            return "no sharding"
        offloaded = ["optimizer"] * self.offload_optimizer + ["weights"] * self.offload_parameters
        where = f", {' and '.join(offloaded)} on the host" if offloaded else ""
        return f"ZeRO-{self.level}{where}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, and of the host for it, at a training step's peak."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float  # of communication
    activations: float
    step: float  # of the optimizer's step, when no activations are alive
    reserve: float
    host: float

    @property
    def total(self) -> float:
        """Bytes of the GPU at the peak: in the backward pass or in the optimizer's step."""
        held = self.weights + self.gradients + self.optimizer + self.buffers + self.reserve
        return held + max(self.activations, self.step)


def model_states(trained: int, frozen: int, per: Bytes, sharding: Sharding) -> Memory:
    """Return the memory of weights, gradients and optimizer, without activations.

    Args:
        trained: parameters that train.
        frozen: parameters that do not.
        per: bytes for each.
        sharding: over which processes, and what goes to the host.
    """
    processes = [sharding.gpus if sharding.level >= level else 1 for level in (1, 2, 3)]
    frozen_weight = per.weight if per.frozen is None else per.frozen
    weights = (trained * per.weight + frozen * frozen_weight) / processes[2]
    gradients = trained * per.gradient / processes[1]
    optimizer = trained * (per.master + per.states) / processes[0]
    step = trained * per.step / processes[0]
    # Data parallelism copies gradients into buckets, all of them; ZeRO a bucket at a time.
    copies = trained * (sharding.gpus > 1) if sharding.level == 0 else sharding.bucket
    buffers = min(copies, trained) * per.gradient
    if sharding.level == 3:
        buffers += min(sharding.live, trained + frozen) * per.weight
    memory = Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        activations=0.0,
        step=step,
        reserve=0.0,
        host=0.0,
    )
    if sharding.offload_optimizer:
        host = memory.optimizer + memory.gradients + memory.step
        memory = replace(memory, gradients=0.0, optimizer=0.0, step=0.0, host=host)
    if sharding.offload_parameters:
        memory = replace(memory, weights=0.0, host=memory.host + memory.weights)
    return memory


def with_activations(
    states: Memory, activations: int, with_gradients: int, gradients_stay: bool, reserve: int
) -> Memory:
    """Return the memory of a whole step.

    Args:
        states: of `model_states`.
        activations: peak of a micro-batch without gradients of parameters.
        with_gradients: the same with them, where none are there at its start.
        gradients_stay: gradients are there all along: summed over micro-batches, or split over
            processes. Else they come while activations go, and only what is held at the peak
            beyond all gradients counts as activations.
        reserve: bytes that are taken before anything is stored.
    """
    if not gradients_stay:
        activations = with_gradients - int(states.gradients)
    return replace(states, activations=float(activations), reserve=float(reserve))


def lora_parameters(linears: Sequence[tuple[int, int]], rank: int) -> int:
    """Return how many parameters LoRA of `rank` adds to linear layers (inputs, outputs)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in linears)
