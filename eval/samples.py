"""How do answers survive a kill? One line per answer, appended and flushed batch by batch.

The first line of the file is the identity of the run: weights, processor, data, wording, settings.
Answers are taken up again only under the same identity; under another one the file is set aside
under its own name and a new one begins (and comes back when its identity does), so that no answer
is lost and none is counted for a model that did not give it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from vlm.errors import UserError

Row = dict[str, Any]
Key = tuple[int, str]  # question's index, view ("image" or "blind")


class SampleStore:
    """The answers of one run in `folder/samples.jsonl`; `rows` holds those already there."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / "samples.jsonl"
        self.identity = dict(identity)
        self.rows: dict[Key, Row] = {}
        self.set_aside: Path | None = None
        self.changed: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take_up()
            self._file: TextIO = self.path.open("a", encoding="utf-8", newline="\n")
            if not self.path.stat().st_size:
                self._write([{"identity": self.identity}])
        except OSError as error:
            raise UserError(
                f"cannot write answers to {self.path}: {error.strerror or error}; "
                "choose another folder with --out"
            ) from error
        self.found = len(self.rows)

    def append(self, rows: Iterable[Row]) -> None:
        """Add answers and hand them to the operating system, which keeps them through a kill.

        Raises:
            UserError: the disk is full or the folder is gone.
        """
        rows = list(rows)
        try:
            self._write(rows)
        except OSError as error:
            raise UserError(
                f"cannot write answers to {self.path}: {error.strerror or error}; "
                f"{len(self.rows)} are saved, the same command goes on from them"
            ) from error
        self.rows.update({_key(row): row for row in rows})

    def close(self) -> None:
        """Close the file; what a full disk refused was already told by `append`."""
        with suppress(OSError):
            self._file.close()

    def _write(self, rows: Iterable[Row]) -> None:
        self._file.write("".join(f"{dump(row)}\n" for row in rows))
        self._file.flush()

    def _take_up(self) -> None:
        """Read the file that is there, without its torn last line; set a foreign one aside."""
        if not self.path.exists():
            self._bring_back()
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1  # a kill tears at most the last line
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        lines = content[:whole].decode("utf-8").split("\n")[:-1]
        if not lines:
            return
        parsed = [_parse(line, f"{self.path}:{number}") for number, line in enumerate(lines, 1)]
        old = parsed[0].get("identity")
        if not isinstance(old, dict):
            raise UserError(f"{self.path} is no answers file of ours; choose another --out folder")
        if old != self.identity:
            self.changed = sorted(
                name for name in {*old, *self.identity} if old.get(name) != self.identity.get(name)
            )
            self.set_aside = self.path.with_name(f"samples.{_digest(old)}.jsonl")
            self.path.rename(self.set_aside)
            self._bring_back()
            return
        self.rows = {_key(row): row for row in parsed[1:]}

    def _bring_back(self) -> None:
        """Take up the answers that were set aside under the present identity, if there are any."""
        mine = self.path.with_name(f"samples.{_digest(self.identity)}.jsonl")
        if mine.exists():
            mine.rename(self.path)
            self._take_up()


def read_answers(folder: Path) -> tuple[dict[str, Any], dict[Key, Row]]:
    """Return the identity and the answers of a run in `folder`, which is left as it is.

    Raises:
        UserError: there are none, or a line is broken.
    """
    path = folder / "samples.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: no answers can be read ({error.strerror})") from error
    parsed = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not parsed or "identity" not in parsed[0]:
        raise UserError(f"{path} is no answers file of ours")
    return parsed[0]["identity"], {_key(row): row for row in parsed[1:]}


def dump(value: Any) -> str:
    """Return JSON with sorted keys: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump(identity).encode()).hexdigest()[:12]


def _key(row: Row) -> Key:
    return row["index"], row["view"]


def _parse(line: str, where: str) -> Row:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken line ({error}); delete it, or the file") from error
