"""Which engine runs a stage: DDP, DeepSpeed's ZeRO or FSDP2? And is it the one that was asked for?

A recipe asks with `training.deepspeed` or `training.fsdp`. Libraries fall back without a word (a
launcher's flag that is not understood, FSDP on CPUs in accelerate), and plain DDP learns the same,
so what stands around the model when training begins is looked at, told, and kept in the manifest.
"""

import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.process import say
from vlm.errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

FOLDER = Path(__file__).parent / "deepspeed"
LEVELS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")  # files in FOLDER
# What a config leaves out is the recipe's: DeepSpeed's own would be float32, and norms cut at 1.
AUTO: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


@dataclass(frozen=True)
class Engine:
    """What a stage runs on.

    Attributes:
        name: "one process", "DDP", "ZeRO-0" to "ZeRO-3", or "FSDP2".
        processes: how many.
        offload: what is kept on the host: "optimizer", "parameters".
        optimizer: the class that takes the steps.
    """

    name: str
    processes: int
    offload: tuple[str, ...] = ()
    optimizer: str = ""

    def __str__(self) -> str:
        """Return a line for the user."""
        count = "" if self.name == "one process" else f", {self.processes} processes"
        host = f", {' and '.join(self.offload)} on the host" if self.offload else ""
        return f"{self.name}{count}{host}"


def deepspeed_config(value: Mapping[str, Any] | str, where: str) -> dict[str, Any]:
    """Return the config that `training.deepspeed` is or names: one of LEVELS, or a file.

    Raises:
        UserError: there is no such file, or it sets what the recipe decides.
    """
    if isinstance(value, Mapping):
        return _checked(dict(value), f"{where}.deepspeed")
    path = FOLDER / f"{value}.json" if value in LEVELS else Path(value)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}.deepspeed: {value} cannot be read ({error}); name a file, or one of "
            f"{', '.join(LEVELS)}"
        ) from error
    return _checked(config, f"{where}.deepspeed {value}")


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a config of DeepSpeed that leaves to the recipe what is the recipe's.

    Raises:
        UserError: it does not; the sentence says how to mend it.
    """
    for name, rather in (
        ("optimizer", "learning rates stand in the stage's trainable, the rest in training.optim"),
        ("scheduler", "the schedule is training.lr_scheduler_type"),
    ):
        if name in config:
            raise UserError(f"{where}: take {name!r} out of it; {rather}")
    name, zero = "stage3_gather_16bit_weights_on_model_save", config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get(name, True):
        raise UserError(f"{where}: take {name} out of it; without it no model is written")
    return {**AUTO, **config, "zero_optimization": {**zero, name: True}}


def cuts_weights(training: Mapping[str, Any], where: str) -> str | None:
    """Return the line of a stage's `training` that cuts its weights to pieces, if one does.

    Raises:
        UserError: the config of DeepSpeed is wrong.
    """
    if training.get("fsdp"):
        return "fsdp"
    given = training.get("deepspeed")
    zero = deepspeed_config(given, where)["zero_optimization"] if given else {}
    return "deepspeed" if zero.get("stage") == 3 else None


def check_fsdp(config: Mapping[str, Any] | str | None, where: str) -> None:
    """Refuse settings of FSDP that a stage cannot end with a whole model under.

    Raises:
        UserError: the file cannot be read, or asks for FSDP1, for weights saved in pieces, or XLA.
    """
    given: Any = config or {}
    if isinstance(config, str):
        try:
            given = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{where}.fsdp_config: {config} cannot be read ({error})") from error
    values = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    wanted = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "xla": False}
    for name, only in wanted.items():
        if values.get(name, only) != only:
            raise UserError(
                f"{where}.fsdp_config.{name} must be {only}, not {values[name]!r}; leave it out"
            )


def forget_engine() -> None:
    """Let go of the engine of the stage before: it stands in globals and in the environment.

    The next stage's model is then built whole in every process. Under ZeRO-3's own loading
    transformers fills the padding row of an embedding that is in pieces, and fails.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    told_each_step = r".*torch\.distributed\.(all_gather_into|reduce_scatter)_tensor"
    warnings.filterwarnings("ignore", told_each_step, FutureWarning)  # by DeepSpeed


@contextmanager
def whole_models(arguments: "TrainingArguments") -> Iterator[None]:
    """Let models be built whole meanwhile; transformers cuts them when it knows of ZeRO-3."""
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if arguments.deepspeed:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def without_compiling(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config under which DeepSpeed compiles nothing, unless it asks for that itself.

    For hosts without a GPU: there an optimizer of DeepSpeed's own gains nothing, and an all-reduce
    through shared memory, called in inference alone, would be compiled for minutes.
    """
    ops: Any = import_module("deepspeed.ops")
    ops.__compatible_ops__ = {}  # of what it would build there; else found out with a compiler
    return {"zero_force_ds_cpu_optimizer": False, **config}


def be_the_only_rank() -> None:
    """Say what a launcher says, for an engine that asks and a process that nobody launched.

    DeepSpeed would look for MPI instead.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def set_up_fsdp(trainer: "Trainer") -> None:
    """Let accelerate shard on CPUs, too, and round where DDP rounds.

    It knows FSDP on accelerators alone, and would run DDP. With bfloat16 it would also round what
    goes into a layer, its cosines, the sums of gradients and the loss: losses off by 0.01 to 0.02.
    """
    import torch
    from accelerate import DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not trainer.args.fsdp:
        return
    state: Any = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        given: Any = trainer.args.fsdp_plugin_args
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**given)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if state.mixed_precision in dtypes:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtypes[state.mixed_precision],
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def engine_of(model: Any, arguments: "TrainingArguments", optimizer: Any) -> Engine:
    """Return what runs a stage, by what stands around its model.

    Args:
        model: as the Trainer calls it.
        arguments: of the stage.
        optimizer: the Trainer's.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    inner = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
    common: dict[str, Any] = {
        "processes": arguments.world_size,
        "optimizer": type(inner).__name__,
    }
    if isinstance(model, FSDPModule):
        settings: Any = arguments.fsdp_config
        offload = ("optimizer", "parameters") if settings.get("cpu_offload") else ()
        return Engine("FSDP2", offload=offload, **common)
    if isinstance(model, DistributedDataParallel):
        return Engine("DDP", **common)
    if arguments.deepspeed:
        from deepspeed import DeepSpeedEngine  # pyright: ignore[reportMissingImports,reportAttributeAccessIssue]

        if isinstance(model, DeepSpeedEngine):
            parts = {
                "optimizer": model.zero_offload_optimizer(),
                "parameters": model.zero_offload_param(),
            }
            offload = tuple(part for part, to in parts.items() if to and to.device != "none")
            return Engine(f"ZeRO-{model.zero_optimization_stage()}", offload=offload, **common)
    return Engine("one process", **common)


def asked_for(arguments: "TrainingArguments") -> str:
    """Return the name of the engine that a stage's arguments ask for."""
    if arguments.deepspeed:
        assert isinstance(arguments.deepspeed, dict), "made by deepspeed_config"
        zero = arguments.deepspeed.get("zero_optimization", {})
        return f"ZeRO-{zero.get('stage', 0)}"
    if arguments.fsdp:
        return "FSDP2"
    return "DDP" if arguments.world_size > 1 else "one process"


def check_engine(trainer: "Trainer") -> Engine:
    """Look at what runs a stage, tell the user, and return it.

    Raises:
        UserError: it is not what the recipe asks for.
    """
    found = engine_of(trainer.model_wrapped, trainer.args, trainer.optimizer)
    wanted = asked_for(trainer.args)
    launched_alone = found.name == "DDP" and found.processes == 1
    if found.name != wanted and not (wanted == "one process" and launched_alone):
        raise UserError(
            f"the recipe asks for {wanted}, but {found} runs here; start it with one of "
            "train/launch/ and without settings of accelerate's own in the environment"
        )
    say(f"engine: {found}")
    return found
