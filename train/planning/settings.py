"""What of a stage's `training:` decides memory and time? Batches, types, optimizer, sharding."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from train.arguments import check_fields
from train.engine import deepspeed_config
from train.planning.memory import Bytes, Engine, Sharding
from train.recipe import StageRecipe
from train.steps import StepSizes


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps for each parameter.

    Attributes:
        moments: numbers of the weight's type (of its float32 copy's, where there is one).
        fixed: bytes whatever the weight's type; 8-bit moments are a byte and a block's scale.
        step: bytes that its step needs for a moment.
    """

    moments: int = 0
    fixed: float = 0.0
    step: float = 0.0


ADAMW = Optimizer(moments=2)
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch_fused": ADAMW,
    "adamw_torch": Optimizer(moments=2, step=4),  # on GPUs the root of all second moments at once
    "adamw_8bit": Optimizer(fixed=2.03),
    "adamw_bnb_8bit": Optimizer(fixed=2.03),
    "paged_adamw_8bit": Optimizer(fixed=2.03),
    "paged_adamw_32bit": Optimizer(fixed=8),
    "lion_32bit": Optimizer(fixed=4),
    "lion_8bit": Optimizer(fixed=1.02),
    "adafactor": Optimizer(step=4),  # a row and a column of each matrix
    "sgd": Optimizer(),
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# DeepSpeed's defaults where the file is silent.
BUCKET = 500_000_000
LIVE = 1_000_000_000


@dataclass(frozen=True)
class StageSettings:
    """A stage's arguments, as far as cost goes.

    Attributes:
        micro_batch: rows of one GPU at once.
        accumulation: micro-batches of an optimizer step.
        epochs, max_steps: how long; max_steps above 0 decides.
        drop_last: whether an epoch's last micro-batch is left out where it is not full.
        checkpointing: decoder layers are computed again in the backward pass.
        keeps_products: all of them but matrix products and attention.
        optimizer: transformers' name.
        lower: the type of mixed precision, None without.
        average: whether an average of the weights is kept in float32.
        engine: who shards; "ddp" where nobody does.
        level, offload_optimizer, offload_parameters: see `Sharding`.
        buckets: how many reduction buckets are in use at once.
        bucket, live: elements, None: DeepSpeed's "auto".
    """

    micro_batch: int
    accumulation: int
    epochs: float
    max_steps: int
    drop_last: bool
    checkpointing: bool
    keeps_products: bool
    optimizer: str
    lower: str | None
    average: bool
    engine: Engine
    level: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    buckets: int = 1
    bucket: int | None = None
    live: int | None = None

    def steps(self, records: int | None, gpus: int) -> int | None:
        """Return the optimizer steps of a stage, None where nobody knows its records."""
        if records is None and self.max_steps <= 0:
            return None
        batch = self.micro_batch * gpus
        sizes = StepSizes(records or 0, batch, self.accumulation, self.drop_last)
        return sizes.total(self.epochs, self.max_steps)

    def sharding(self, gpus: int, hidden_size: int, layer: int) -> Sharding:
        """Return how states are spread over `gpus`.

        Args:
            gpus: how many.
            hidden_size: of the language model; DeepSpeed's "auto" bucket is its square.
            layer: parameters of the largest decoder layer; FSDP gathers two at once.
        """
        if self.engine == "ddp":
            return Sharding("ddp", gpus, 0)
        if self.engine == "fsdp":
            return Sharding("fsdp", gpus, 3, live=2 * layer)
        bucket = hidden_size**2 if self.bucket is None else self.bucket
        return Sharding(
            "deepspeed",
            gpus,
            self.level,
            self.offload_optimizer,
            self.offload_parameters,
            bucket * self.buckets,
            LIVE if self.live is None else self.live,
        )


def deepspeed(
    gpus: int, hidden_size: int, level: int, optimizer: bool = False, parameters: bool = False
) -> Sharding:
    """Return a sharding with buckets as the files in train/deepspeed have them."""
    return Sharding("deepspeed", gpus, level, optimizer, parameters, 2 * hidden_size**2, LIVE)


def all_shardings(engine: Engine, gpus: int, hidden_size: int) -> list[Sharding]:
    """Return what a table compares with a stage that runs on `engine`."""
    offloaded = [(2, True, False), (3, True, False), (3, True, True)]
    plain = [Sharding("deepspeed" if engine == "deepspeed" else "ddp", gpus, 0)]
    if gpus > 1:  # one has nobody to share with
        plain += [deepspeed(gpus, hidden_size, level) for level in (1, 2, 3)]
    return plain + [deepspeed(gpus, hidden_size, *choice) for choice in offloaded]


def read_settings(stage: StageRecipe) -> StageSettings:
    """Return the settings of a stage, with transformers' defaults for what it leaves out.

    Raises:
        UserError: a field that TrainingArguments does not have, or a DeepSpeed file that is none.
    """
    from transformers import TrainingArguments

    where = f"stages.{stage.name}.training"
    values: dict[str, Any] = {field.name: field.default for field in fields(TrainingArguments)}
    values |= check_fields(stage.training, where)
    chosen = values["optim"]
    optimizer = str(chosen.value if isinstance(chosen, Enum) else chosen)
    common = {
        "micro_batch": values["per_device_train_batch_size"],
        "accumulation": values["gradient_accumulation_steps"],
        "epochs": float(values["num_train_epochs"]),
        "max_steps": values["max_steps"],
        "drop_last": values["dataloader_drop_last"],
        "checkpointing": bool(
            values["activation_checkpointing"] or values["gradient_checkpointing"]
        ),
        "keeps_products": "keep" in (values["activation_checkpointing_kwargs"] or {}),
        "optimizer": optimizer,
        "average": stage.ema is not None,
        "lower": "bfloat16" if values["bf16"] else "float16" if values["fp16"] else None,
    }
    if values["deepspeed"]:
        return StageSettings(**common, **read_deepspeed(values["deepspeed"], where))
    engine: Engine = "fsdp" if values["fsdp"] else "ddp"
    return StageSettings(**common, engine=engine, level=3 if values["fsdp"] else 0)


def read_deepspeed(config: Mapping[str, Any] | str, where: str) -> dict[str, Any]:
    """Return the fields of `StageSettings` that a DeepSpeed config decides.

    Raises:
        UserError: the file cannot be read.
    """
    zero = deepspeed_config(config, where).get("zero_optimization", {})

    def offloads(name: str) -> bool:
        return zero.get(name, {}).get("device", "none") != "none"

    def number(name: str, default: int) -> int | None:
        value = zero.get(name, default)
        return None if value == "auto" else int(float(value))

    level = int(zero.get("stage", 0))
    return {
        "engine": "deepspeed",
        "level": level,
        "offload_optimizer": offloads("offload_optimizer"),
        "offload_parameters": offloads("offload_param"),
        "buckets": 2 if zero.get("overlap_comm", level == 3) else 1,
        "bucket": number("reduce_bucket_size", BUCKET),
        "live": number("stage3_max_live_parameters", LIVE),
    }


def bytes_per_parameter(dtype: str, settings: StageSettings, engine: Engine) -> Bytes:
    """Return what a parameter keeps.

    Args:
        dtype: of the recipe's model.
        settings: of the stage.
        engine: DeepSpeed casts the weights to the lower type and keeps float32 ones beside them.
    """
    optimizer = OPTIMIZERS.get(settings.optimizer, ADAMW)
    weight = DTYPE_BYTES[dtype]
    if engine == "deepspeed":
        weight = 2 if settings.lower else weight
        # The step turns this process's gradients into float32 ones.
        states = 4 * optimizer.moments + optimizer.fixed
        return Bytes(weight, weight, 4, states, max(optimizer.step, 4))
    average = 4 if settings.average else 0
    states = weight * optimizer.moments + optimizer.fixed + average
    return Bytes(weight, weight, 0, states, optimizer.step)
