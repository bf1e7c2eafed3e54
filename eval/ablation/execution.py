"""How is one run trained and scored? By the commands a reader would type; a failure is noted."""

import shutil
import sys
from pathlib import Path
from typing import Any

from eval.ablation.runs import LOG, NOTE, RECIPE, Run, Scoring
from vlm.child_commands import run_side_by_side
from vlm.done import make_folder, write_flushed, write_note
from vlm.yaml_values import to_text

TAIL_BYTES = 4000  # of the log, enough for its last line
Json = dict[str, Any]


def execute(run: Run, scoring: Scoring, lock: int) -> None:
    """Train and score a run as far as that is not done; a failure is noted, not raised.

    When both are done the stages' checkpoints are deleted; their models stay.

    Args:
        run: its folder is ours (`claim`).
        scoring: how it is scored.
        lock: see `vlm.child_commands`.

    Raises:
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    make_folder(run.folder)
    note: Json = {"settings": run.settings, "peak_memory_mb": 0, "starts": 0}
    note |= run.note() | {"failed": None}
    write_flushed(run.folder / RECIPE, to_text(dict(run.recipe)))
    write_note(run.folder / NOTE, note)
    log = run.folder / LOG
    if not run.is_trained:
        note |= {"starts": note["starts"] + 1, "scored": None}
        write_note(run.folder / NOTE, note)
        words = ["train", str(run.folder / RECIPE)]
        ended = run_side_by_side([words], lock, log, lambda: _show_tail(log))
        note["peak_memory_mb"] = max(note["peak_memory_mb"], ended.peak_memory_mb)
        if ended.failed or not run.is_trained:
            code = ended.failed[0][1] if ended.failed else 0
            write_note(run.folder / NOTE, note | {"failed": f"training: {_reason(log, code)}"})
            return
        write_note(run.folder / NOTE, note)
    words = ["eval", str(run.model), *scoring.words, "--out", str(run.scores)]
    ended = run_side_by_side([words], lock, log, lambda: _show_tail(log))
    if ended.failed:
        reason = _reason(log, ended.failed[0][1])
        write_note(run.folder / NOTE, note | {"failed": f"scoring: {reason}"})
        return
    for folder in run.stages:  # only good for going on; several models' would fill a disk
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_note(run.folder / NOTE, note | {"scored": scoring.to_json()})


def _reason(log: Path, code: int) -> str:
    """Return why a command failed: what it said last."""
    if code < 0:
        return f"stopped by signal {-code}, as a machine without memory does"
    return _last_line(log) or f"exit code {code}"


def _last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _show_tail(log: Path) -> None:
    """Show the last line of a log in place, where somebody looks on."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K    {_last_line(log)[:90]}\r")
        sys.stderr.flush()
