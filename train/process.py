"""What is set once per process: threads, precision, seeds, and who talks to the terminal?"""

import ctypes
import gc
import os
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

if TYPE_CHECKING:
    from train.recipe import Recipe


def is_main_process() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print from the main process alone."""
    if is_main_process():
        print(text, flush=True)


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether an error of a common act means that another process is gone.

    gloo tells it in words alone.
    """
    words = ("Connection closed by peer", "Connection reset by peer")
    lost = (torch.distributed.DistNetworkError, torch.distributed.DistBackendError)
    return isinstance(error, lost) or any(word in str(error) for word in words)


def name_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU; the Trainer imports it, and it would warn of that."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def set_up_torch(recipe: "Recipe") -> None:
    """Apply the recipe's settings of torch, and leave the terminal to our own progress line."""
    disable_progress_bar()
    name_accelerator()
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.set_float32_matmul_precision(recipe.float32_matmul_precision)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step's tensors leave, which the next step's take again.

    By itself it gives them back to the system, whose pages have to be cleared and mapped again in
    each step. Tensors of more than 32 MB, the most that it can be told, still come and go. Who has
    told it something else by MALLOC_... in the environment is left alone.
    """
    if os.name != "posix" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)


def free_memory() -> None:
    """Let go of the stage before: its Trainer and model refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seed_everything(seed: int) -> None:
    """Seed every generator before a stage's model is built; new weights then follow the seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
