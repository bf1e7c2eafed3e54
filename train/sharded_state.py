"""How is what sharded stages keep written as if it were whole, and who may go on from it?

FSDP2: weights as every checkpoint has them, the optimizer's state by parameter names in
`optimizer.bin`, so any number of processes can go on. accelerate's own way would add a pickle of
the weights. DeepSpeed keeps a file of each process, `global_step<n>/`, beside the whole weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer

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
