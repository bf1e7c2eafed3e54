"""What exactly was run, on what, with what result? The stage's `manifest.json`."""

import hashlib
import json
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from data_recipes.mixture import Source
from data_recipes.readers import data_files
from train.engine import Engine
from train.process import is_main_process
from train.recipe import Recipe, StageRecipe
from vlm.done import write_flushed
from vlm.file_hash import WHOLE_HASH_BYTES, hash_file

PACKAGES = (
    *("vlm-suite", "torch", "transformers", "accelerate", "numpy", "pillow", "deepspeed"),
    *("peft", "bitsandbytes"),
)


class StageManifest(TrainerCallback):
    """Keeps `manifest.json` true while a stage runs: at its start, each checkpoint and its end."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        stage: StageRecipe,
        device: torch.device,
        features: Mapping[str, Any] | None = None,
        previous: Path | None = None,
        step_of: Mapping[str, int] | None = None,
    ) -> None:
        """Write the manifest of a stage that starts or goes on.

        Args:
            folder: the stage's.
            recipe: of the run.
            stage: that starts.
            device: that it trains on.
            features: what was decided of a frozen encoder's.
            previous: folder of the stage before.
            step_of: how many records a step takes.
        """
        self.folder = folder
        self.start = time.perf_counter()
        before = read_manifest(folder)
        self.seconds_before = before.get("seconds", 0.0)
        self.content: dict[str, Any] = {
            "run": recipe.name,
            "stage": stage.name,
            "seed": recipe.seed,
            "step": before.get("step", 0),
            "recipe_sha256": hash_tree(recipe.to_dict()),
            "trainable": asdict(stage)["trainable"],
            "changes": asdict(stage)["changes"],
            "adapter": asdict(stage)["adapter"],
            "quantization": recipe.model.quantization,
            "feature_cache": features,
            "previous": hash_manifest(previous),
            "step_of": step_of,
            "data": hash_sources(stage.data.sources) if is_main_process() else {},
            "validation": _held_out(stage) if is_main_process() else {},
            **environment(device),
        }
        self.write("running")

    def tell_engine(self, engine: Engine) -> None:
        """Note what runs the stage, before its first step."""
        self.content["engine"] = asdict(engine)
        self.write("running")

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.content["step"] = state.global_step
        self.write("running")

    def finish(self, step: int, seen: dict[str, int], figures: dict[str, Any]) -> None:
        """Write the final manifest, with figures; the stage counts as done from here on."""
        skipped = count_skipped(self.folder)
        self.content |= figures
        self.content["step"] = step
        self.content["records"] = {
            name: {"seen": count, "skipped": skipped.get(name, 0)} for name, count in seen.items()
        }
        self.write("done")

    def write(self, status: str) -> None:
        """Replace the file; seconds add up over the parts of a stage that was cut short."""
        if is_main_process():
            seconds = self.seconds_before + time.perf_counter() - self.start
            fresh = {"seconds": round(seconds, 2), "peak_memory_mb": peak_memory_mb()}
            text = json.dumps({"status": status, **self.content, **fresh}, indent=2)
            write_flushed(self.folder / "manifest.json", text + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a stage's manifest, {} where there is none yet."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def hash_manifest(folder: Path | None) -> str | None:
    """Return what tells one training of a stage from another, None where there is no stage."""
    return None if folder is None else hash_tree(read_manifest(folder))


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, the suite's commit and the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _commit(Path(__file__).parent),
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "platform": platform.platform(),
    }


def hash_sources(sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """Return path, size and hash of every data file, by source; of several files, by file too."""
    return {source.name: _hash_data(source) for source in sources}


def _held_out(stage: StageRecipe) -> dict[str, dict[str, Any]]:
    return {} if stage.validation is None else hash_sources(stage.validation.data.sources)


def _hash_data(source: Source) -> dict[str, Any]:
    paths = data_files(source.path)
    files = [hash_file(path, WHOLE_HASH_BYTES // len(paths)) for path in paths]
    return files[0] if len(files) == 1 else {"path": source.path, "files": files}


def hash_tree(tree: Any) -> str:
    """Return a hash of plain values that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def peak_memory_mb() -> dict[str, float]:
    """Return this process's largest resident size, and the GPU's if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated() / 1e6
    return {name: round(value, 1) for name, value in peaks.items()}


def count_skipped(folder: Path) -> dict[str, int]:
    """Return how many records of each source were skipped; all ranks, each position once."""
    skipped: dict[int, str] = {}
    for path in sorted(folder.glob("skipped.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                note = json.loads(line)
                skipped[note["position"]] = note["source"]
    return dict(Counter(skipped.values()))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit(folder: Path) -> dict[str, Any] | None:
    """Return the suite's commit, None where it is not run from a clone."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "modified": dirty}
    except (OSError, subprocess.CalledProcessError):
        return None
