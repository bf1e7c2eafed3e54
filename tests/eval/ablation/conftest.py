"""How do tests run real `vlm` commands as processes that need not import everything again?"""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vlm.cli import main

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL


class Popen:
    """As `subprocess.Popen([python, "-m", "vlm", ...])`, but a fork of this process."""

    def __init__(
        self,
        command: Sequence[str],
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
        **_: Any,
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "vlm"]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(command[3:]), [stdout, stderr], start_new_session)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for its end and return the exit code."""
        return self._look(0)

    def terminate(self) -> None:
        """Ask it to stop."""
        os.kill(self.pid, signal.SIGTERM)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
    """As `subprocess.run(command, capture_output=True, text=True)`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Popen(command, out, err).wait()
        for file in (out, err):
            file.seek(0)
        return SimpleNamespace(returncode=code, stdout=out.read(), stderr=err.read())


def _become(words: list[str], files: Sequence[Any], start_new_session: bool) -> None:
    """Run the command and leave, whatever happens: the tests go on in the other process."""
    code = 1
    try:
        if start_new_session:
            os.setsid()
        sys.stdin = open(os.devnull)
        for number, file in enumerate(files, start=1):
            if file == DEVNULL:
                file = open(os.devnull, "wb")
            if file is not None:
                os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = ["vlm", *words]
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.fixture
def forked() -> SimpleNamespace:
    """What `subprocess` has, as far as our commands use it, in forks."""
    return SimpleNamespace(Popen=Popen, run=run, PIPE=PIPE, STDOUT=STDOUT, DEVNULL=DEVNULL)
