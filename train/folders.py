"""What stands in a run's folder, is it whole, and may this run write to it?

<output_dir>/recipe.yaml            the whole resolved recipe
<output_dir>/<stage>/               a checkpoint: config, weights, processor, chat template
    base/                           of a stage that keeps what it trains alone: the frozen weights,
                                    where no other folder holds just these (vlm/on_base.py)
    recipe.yaml                     what this stage was told: model, seed, stage
    manifest.json                   what was run, status, counts
    training_log.jsonl loss.png tensorboard/ skipped.<rank>.jsonl
    checkpoints/checkpoint-<step>/  what a killed stage goes on from
"""

import errno
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from train.manifest import read_manifest
from train.process import is_main_process, say
from train.recipe import Recipe, StageRecipe
from vlm.done import first_difference, flush, share_as_folder, write_flushed
from vlm.errors import UserError
from vlm.yaml_values import read_file, to_text

LOCK = ".lock"  # names the process that trains here
# Settings that may change between the parts of one stage: they do not reach the weights.
FREE_SETTINGS = (
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "report_to",
    "run_name",
    "gradient_checkpointing",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    # Their product with the number of processes may not: see train.sharded_state.check_ranks.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


def stage_tree(recipe: Recipe, stage: StageRecipe) -> dict[str, Any]:
    """Return all that decides a stage's result, except the stage before it."""
    tree = recipe.to_dict()
    return {"model": tree["model"], "seed": recipe.seed, "stage": asdict(stage)}


def what_differs(before: Any, now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first setting that may not change within a stage, see `first_difference`.

    A validation may: it leaves no trace in the weights.
    """
    stage = before.get("stage") if isinstance(before, dict) else None
    if isinstance(stage, dict):
        stage.pop("validation", None)
    stage = {name: value for name, value in now["stage"].items() if name != "validation"}
    return first_difference(before, {**now, "stage": stage}, FREE_SETTINGS)


@contextmanager
def output_of(recipe: Recipe) -> Iterator[None]:
    """Make the output folder, write the resolved recipe and be the folder's only writer meanwhile.

    The lock is of this process alone (POSIX), so that a kill frees it at once: loader workers live
    on for some seconds, and a lock that they inherit would, too.

    Raises:
        UserError: the folder cannot be written, or another run writes to it.
    """
    folder = Path(recipe.output_dir)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe") as probe:
                probe.write(b"0" * 4096)
                probe.flush()
            if is_main_process():
                _lock(stack.enter_context((folder / LOCK).open("a+")), folder)
                write_flushed(folder / "recipe.yaml", to_text(recipe.to_dict()))
        except OSError as error:
            raise UserError(
                f"output_dir {folder} cannot be written ({error.strerror}); choose another with "
                "--output_dir"
            ) from error
        yield


def _lock(file: TextIO, folder: Path) -> None:
    """Take a folder's lock, and note who has it.

    Raises:
        UserError: another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UserError(
            f"another run ({file.read().strip()}) is at work in {folder}; wait for it, stop it, or "
            "choose another --output_dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        say(f"{folder} is on a disk without locks: nothing keeps a second run from writing there")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()


def claim(recipe: Recipe, stage: StageRecipe, folder: Path) -> bool:
    """Enter a stage's folder; return whether the stage is done already.

    Raises:
        UserError: the folder belongs to a stage with other settings; the sentence names one.
    """
    wanted = stage_tree(recipe, stage)
    written = folder / "recipe.yaml"
    if written.exists():
        if found := what_differs(read_file(written), wanted):
            path, before, now = found
            raise UserError(
                f"{folder} holds stage {stage.name!r} with {path} = {before!r}, but now it is "
                f"{now!r}; choose another --output_dir, or delete it"
            )
    elif is_main_process() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no stage of a run; choose another --output_dir")
    if is_main_process() and not is_done(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_flushed(written, to_text(wanted))
    return is_done(folder)


def is_done(folder: Path) -> bool:
    """Return whether a stage was trained to its end and written in full."""
    return read_manifest(folder).get("status") == "done"


def check_space(
    folder: Path, model: Any, saves_checkpoints: bool, averages: bool, trained_only: bool = False
) -> None:
    """Refuse to start where not even one checkpoint, with averages or without, would fit.

    Args:
        folder: on the disk that is looked at.
        model: with the freeze plan applied.
        saves_checkpoints: whether there are any but the final model.
        trained_only: whether they hold what trains alone.

    Raises:
        UserError: the disk has too little room; the sentence has both numbers.
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad, p.numel()) for p in model.parameters()]
    weights = sum(size for size, trains, _ in sizes if trains or not trained_only)
    trained = sum(count for _, trains, count in sizes if trains)
    beside = 4 * trained * (3 if averages else 2)  # float32: two of AdamW
    needed = weights + (weights + beside if saves_checkpoints else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB of free space, but a checkpoint and the final model "
            f"take {needed / 1e9:.2f} GB; free some, or choose another --output_dir"
        )


def flush_files(folder: Path) -> None:
    """Wait until the files directly in a folder are on the disk, readable as it is."""
    for path in folder.iterdir():
        if path.is_file():
            share_as_folder(path)
            flush(path)
    flush(folder)
