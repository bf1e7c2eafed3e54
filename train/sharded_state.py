"""How is what sharded stages keep written as if it were whole, and who may go on from it?

FSDP2: weights as every checkpoint has them, the optimizer's state by parameter names in
`optimizer.bin`, so any number of processes can go on. accelerate's own way would add a pickle of
the weights. DeepSpeed keeps a file of each process, `global_step<n>/`, beside the whole weights;
`train.zero_states` lets another number of them go on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm.errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

OPTIMIZER = "optimizer.bin"


def settled(state: Any) -> Any:
    """Return a tree whose tensors are plain ones: gathered on CPUs they are still on their way."""
    if isinstance(state, Mapping):
        return {name: settled(value) for name, value in state.items()}
    if isinstance(state, Tensor) and type(state) is not Tensor:
        return state.clone()
    return state


def save_fsdp_states(trainer: "Trainer", folder: Path) -> None:
    """Write the whole state of optimizer and schedule; asked of every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    known: Any = trainer
    state = get_optimizer_state_dict(known.model, known.optimizer, options=options)
    if trainer.args.should_save:
        torch.save(settled(state), folder / OPTIMIZER)
        torch.save(known.lr_scheduler.state_dict(), folder / "scheduler.pt")


def check_ranks(
    checkpoint: Path, before: Mapping[str, Any], arguments: "TrainingArguments"
) -> None:
    """Refuse to go on from a checkpoint as what it was not written by.

    Args:
        checkpoint: the stage's newest.
        before: the manifest of the stage so far.
        arguments: of the stage now.

    Raises:
        UserError: a step would take another number of records.
    """
    then, now = before.get("step_of"), step_of_records(arguments)
    same = then is None or then["records"] == now["records"]
    if then is not None and arguments.dataloader_drop_last:
        same = then == now
    if not same:
        assert then is not None
        raise UserError(
            f"{checkpoint} was written with {then['records']} records a step, but now it would be "
            f"{now['records']} ({arguments.world_size} processes); change "
            "per_device_train_batch_size or gradient_accumulation_steps so that they are as many"
        )


def step_of_records(arguments: "TrainingArguments") -> dict[str, int]:
    """Return how many records an optimizer step takes, and how many of them at once."""
    at_once = arguments.train_batch_size * arguments.world_size
    return {"records": at_once * arguments.gradient_accumulation_steps, "at_once": at_once}
