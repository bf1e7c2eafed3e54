"""Which checkpoint can a stage go on from? The newest one that is whole; a torn one is passed over.

A checkpoint counts when `complete.json` lists all its files at their sizes. That note is written
last, after every file was flushed to disk, so a process killed (or a machine lost) at any moment
leaves either a whole checkpoint or one that is recognised as torn.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vlm.done import flush, share_as_folder, write_flushed
from vlm.errors import UserError
from vlm.on_base import read_base, stands_on_base

PREFIX = "checkpoint-"
NOTE = "complete.json"
LOSSES = "losses.json"  # of the last steps, see `train.spikes`
RECIPE = "recipe.yaml"  # of the stage that wrote it
DEEPSPEED = ("latest", "zero_to_fp32.py", "zero_to_torch.py")  # beside its folder of states
# What a model's folder gets no copy of.
STATE = (NOTE, LOSSES, RECIPE, "trainer_state.json", "optimizer.bin", *DEEPSPEED)


def step_of(folder: Path) -> int:
    """Return the optimizer step a checkpoint was written after."""
    return int(folder.name.removeprefix(PREFIX))


def is_full_disk(error: Exception) -> bool:
    """Return whether an error of a write means that the disk, or the user's share, is full.

    torch and safetensors write in their own code and tell it in words, without an errno; torch
    mostly notices no more than that its file is shorter than what it has written.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    words = ("No space left", "quota exceeded", "failed writing file", "unexpected pos")
    return any(word in str(error) for word in words)


@contextmanager
def full_disk_told(what: str, folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a sentence.

    Args:
        what: could not be written.
        folder: of the checkpoints.

    Raises:
        UserError: the disk is full; the sentence names the newest checkpoint, which is untouched.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"no space left in {folder} for {what}; {newest(folder) or 'no earlier checkpoint'} is "
            "whole: make room, and the same command goes on"
        ) from error


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copy what a checkpoint holds beside the state of training: model, processor, template."""
    for path in checkpoint.iterdir():
        state = path.suffix in (".pt", ".pth") or path.name in STATE
        if path.is_file() and not state:
            shutil.copy(path, folder / path.name)
    if stands_on_base(folder):
        read_base(checkpoint).write(folder)  # the note says where from its own folder


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint, then note that it is whole."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != NOTE]
    for path in files:
        share_as_folder(path)
        flush(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}
    write_flushed(folder / NOTE, json.dumps(sizes, indent=1))
    flush(folder.parent)


def is_whole(folder: Path) -> bool:
    """Return whether every file that `seal` noted is there in full."""
    try:
        sizes = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first, torn ones included."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=step_of)


def newest(folder: Path) -> Path | None:
    """Return the whole checkpoint of the highest step, or None."""
    whole = [path for path in all_checkpoints(folder) if is_whole(path)]
    return whole[-1] if whole else None


def damaged(folder: Path) -> list[Path]:
    """Return the checkpoints after the newest whole one that were whole and no longer are."""
    good = newest(folder)
    least = -1 if good is None else step_of(good)
    later = [path for path in all_checkpoints(folder) if step_of(path) > least]
    return [path for path in later if (path / NOTE).exists()]


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` whole checkpoints, and torn ones older than those."""
    if not keep:
        return
    whole = [path for path in all_checkpoints(folder) if is_whole(path)]
    if not whole:
        return
    kept = whole[-keep:]
    for path in all_checkpoints(folder):
        if path not in kept and step_of(path) < step_of(whole[-1]):
            (path / NOTE).unlink(missing_ok=True)  # a half-deleted folder must count as torn
            shutil.rmtree(path)
