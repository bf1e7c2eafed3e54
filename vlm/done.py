"""Is a folder's work finished, and with these settings? A JSON note, written last, says so."""

import json
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.errors import UserError


def read_done(path: Path, settings: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """Return the note of finished work, None if there is none.

    Args:
        path: the note.
        settings: what the work was asked to be; the note holds them under "settings".
        what: names the work in an error, such as "scenes".

    Raises:
        UserError: the note is not ours, or speaks of other settings.
    """
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        found = note["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} was not written for {what}; choose another --out, or remove the file"
        ) from error
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        raise UserError(
            f"{path.parent} holds {what} of other settings (see {path}); "
            "choose another --out or remove the folder"
        )
    return note


def first_difference(
    before: Any, now: Any, free: Container[str] = ()
) -> tuple[str, Any, Any] | None:
    """Return (dotted path, value before, value now) of the first leaf that differs, None if equal.

    Args:
        before: a tree of plain values.
        now: another.
        free: last names of paths that may differ.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for path in [*old, *new]:
        if old.get(path) != new.get(path) and path.rpartition(".")[2] not in free:
            return path, old.get(path), new.get(path)
    return None


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf of a tree of plain values."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, (Mapping, list)) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def write_note(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file at once, see `write_flushed`."""
    write_flushed(path, json.dumps(values, indent=2) + "\n")


def write_flushed(path: Path, text: str) -> None:
    """Replace a small file at once and wait for the disk: a kill leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_as_folder(path: Path) -> None:
    """Let a file be read by whoever may read its folder: safetensors lets its owner alone."""
    with suppress(OSError):
        path.chmod(path.parent.stat().st_mode & 0o666)


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the output folder {path} cannot be made ({error.strerror}); choose another --out"
        ) from error
    if not os.access(path, os.W_OK):
        raise UserError(f"the output folder {path} cannot be written; choose another --out")
