"""How does one command run others: as child processes, watched, alone in its folder?"""

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from vlm.errors import UserError

INTERRUPTED = 130  # exit code of a command that Ctrl-C stopped
SAMPLE_SECONDS = 0.25  # between two looks at the memory of the running commands


@dataclass(frozen=True)
class Ended:
    """What became of commands that ran side by side.

    Attributes:
        seconds: from the first start to the last end.
        peak_memory_mb: most resident memory of all of them together, children included.
        failed: number and exit code of those that failed; not of those stopped because of them.
    """

    seconds: float
    peak_memory_mb: int
    failed: list[tuple[int, int]]


def run_side_by_side(
    commands: Sequence[Sequence[str]],
    lock: int,
    log: Path | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """Run commands (the words after `vlm`) at once, until all are done or one has failed.

    Args:
        commands: e.g. [["train", "recipe.yaml"]].
        lock: the descriptor of `only_one`, which they inherit.
        log: file that gets what they print, after what it holds; None: the terminal.
        watch: called a few times a second while they run.

    Raises:
        KeyboardInterrupt: the user stopped them; they have saved what they had.
    """
    started, peak = time.perf_counter(), 0
    output = None if log is None else log.open("ab")
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "vlm", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[lock],
        )
        for words in commands
    ]
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            peak = max(peak, sum(_tree_memory(child.pid) for child in children))
            watch()
            time.sleep(SAMPLE_SECONDS)
        failed = [i for i, child in enumerate(children) if child.poll()]
    finally:
        # After Ctrl-C they got the signal too. Terminated ones finish their step and save.
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
        if output is not None:
            output.close()
    codes = [(i, children[i].returncode) for i in failed]
    if any(code == INTERRUPTED for _, code in codes):
        raise KeyboardInterrupt
    return Ended(time.perf_counter() - started, round(peak / 1e6), codes)


def _tree_memory(pid: int) -> int:
    """Return the resident memory of a process and its children in bytes, 0 if it is gone."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.NoSuchProcess:
        return 0


@contextmanager
def only_one(out: Path, what: str) -> Iterator[int]:
    """Hold a folder's lock, which the commands inherit, and yield its descriptor.

    A command that is killed may leave others at work; they hold the lock until they end, so a
    second one never writes beside them.

    Args:
        out: the folder.
        what: names the command in the error, such as "a quickstart".

    Raises:
        UserError: the lock is taken.
    """
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{what}, or a command it started, is still at work in {out}; "
                "wait for it, stop it, or choose another --out"
            ) from error
        yield file.fileno()
