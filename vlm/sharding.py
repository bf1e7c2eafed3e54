"""Do other processes hold pieces of the weights, so that all of them have to run the same modules?

Under DeepSpeed's ZeRO-3 and FSDP2 a module's weights are put together by all processes whenever it
runs, forward and backward. A process that left a module out, or ran it more often than the others,
would leave them waiting for ever.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def weights_are_sharded(module: nn.Module) -> bool:
    """Return whether processes hold pieces of a module's weights."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if is_deepspeed_zero3_enabled():
        return True
    from torch.distributed.fsdp import FSDPModule  # slow to import, and few need it

    return any(isinstance(inside, FSDPModule) for inside in module.modules())


def agreement(module: nn.Module, device: torch.device) -> Callable[[int], int] | None:
    """Return what makes of this process's count that of all, None where they need not agree."""
    return partial(most_of_all, device=device) if weights_are_sharded(module) else None


def most_of_all(count: int, device: torch.device) -> int:
    """Return the largest of all processes' counts; all of them have to ask."""
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most.item())
