"""Is there a C compiler, and where is the scan's kernel that it built?

The library goes to the user's cache folder under a name made of everything that it depends on: the
source, the compiler, the processor. It is written aside and then renamed, so processes that build
it at the same time do not meet.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("scan_kernel.c")
COMPILERS = ("cc", "gcc", "clang")
# gcc has -march=native on x86 and Arm, clang has it on x86 only.
PROCESSOR_FLAGS = ("-march=native", "-mcpu=native")
FLAGS = ("-O3", "-shared", "-fPIC", "-pthread")
FUNCTIONS = ("scan_lanes", "scan_run")
TIME_LIMIT = 120  # seconds; it takes about one


@functools.cache
def load_kernel() -> ctypes.CDLL | str:
    """Return the library, built if it is not there yet, or the reason why there is none."""
    found = (shutil.which(name) for name in COMPILERS)
    compiler = next((path for path in found if path), None)
    if compiler is None:
        return f"no C compiler ({', '.join(COMPILERS)}) is on PATH"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"selective_scan-{_key(compiler)}.so"
        if not library.exists():
            error = _build(compiler, library)
            if error:
                return error
        loaded = ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # no place to write to (or no home), or it cannot load
        return str(error)
    if not all(hasattr(loaded, name) for name in FUNCTIONS):
        return f"{library} lacks the functions {', '.join(FUNCTIONS)}; delete it"
    return loaded


def cache_folder() -> Path:
    """Return the folder for what this suite builds on a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-suite"


def _build(compiler: str, library: Path) -> str:
    """Compile to `library`; return "", or what the compiler said."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        target = Path(folder) / library.name
        said = ""
        for flag in PROCESSOR_FLAGS:
            command = [compiler, *FLAGS, flag, str(SOURCE), "-o", str(target)]
            try:
                process = subprocess.run(
                    command, capture_output=True, timeout=TIME_LIMIT, check=False
                )
            except subprocess.TimeoutExpired:
                return f"{' '.join(command)} did not end in {TIME_LIMIT} seconds"
            if process.returncode == 0:
                target.replace(library)
                return ""
            reason = process.stderr.decode(errors="replace").strip()
            said = said or f"{' '.join(command)} failed: {reason}"
    return said


def _key(compiler: str) -> str:
    """Return a name for the source, the compiler and the processor."""
    path = Path(compiler).resolve()
    status = path.stat()
    parts = [SOURCE.read_text(), str(path), str(status.st_mtime_ns), str(status.st_size)]
    parts += [*FLAGS, *PROCESSOR_FLAGS, platform.machine(), platform.processor(), _features()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _features() -> str:
    """Return what Linux says the processor can do; "" on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
