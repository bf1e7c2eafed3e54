"""How is one variant trained and scored: by the commands a reader would type, once, and noted?

OUT/runs/<row>/seed<n>/
    recipe.yaml     the whole resolved recipe; `vlm train` of it is this very run
    run.json        what is done, how long it took, why it failed
    train/          what `vlm train` writes, a folder per stage
    eval/           what `vlm eval` writes
    log.txt         what both printed
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.ablation.rows import Row
from vlm.child_commands import run_side_by_side
from vlm.done import first_difference, make_folder, write_flushed, write_note
from vlm.errors import UserError
from vlm.overrides import apply_overrides
from vlm.yaml_values import to_text

NOTE, LOG, RECIPE = "run.json", "log.txt", "recipe.yaml"
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training of one row.

    Attributes:
        row: the variant.
        seed: of the training.
        folder: gets all that belongs to the run.
        recipe: the whole recipe as plain values.
    """

    row: Row
    seed: int
    folder: Path
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return what the run is called in sentences."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def model(self) -> Path:
        """Return the folder of the last stage, which is scored."""
        return self.folder / "train" / self.recipe["stages"][-1]["name"]

    @property
    def scores(self) -> Path:
        """Return the folder of the scores."""
        return self.folder / "eval"

    @property
    def is_trained(self) -> bool:
        """Return whether the last stage was trained to its end, as its manifest says."""
        return _read(self.model / "manifest.json").get("status") == "done"

    def is_scored(self, score: Sequence[str]) -> bool:
        """Return whether the trained model was scored with these words of `vlm eval`."""
        return self.is_trained and self.note().get("scored") == list(score)

    def note(self) -> Json:
        """Return run.json, {} where there is none yet."""
        return _read(self.folder / NOTE)


def runs_of(
    base: Mapping[str, Any], rows: Sequence[Row], seeds: Sequence[int], out: Path
) -> list[Run]:
    """Return the runs, all rows of the first seed first.

    Args:
        base: the resolved recipe that the rows change.
        rows: the variants.
        seeds: one training each.
        out: the ablation's folder.

    Raises:
        UserError: a row changes what the recipe does not have.
    """
    runs = []
    for seed in seeds:
        for row in rows:
            folder = out / "runs" / row.folder / f"seed{seed}"
            tree = copy.deepcopy(dict(base))
            apply_overrides(tree, dict(row.changes))
            tree |= {"name": row.name, "output_dir": str(folder / "train"), "seed": seed}
            runs.append(Run(row, seed, folder, tree))
    return runs


def claim(run: Run) -> None:
    """Refuse a folder that holds a run of other settings.

    Raises:
        UserError: the sentence names one setting that differs.
    """
    note = run.note()
    if not note:
        if run.folder.exists() and any(run.folder.iterdir()):
            raise UserError(f"{run.folder} was not written by an ablation; choose another --out")
        return
    if found := first_difference(note["settings"], settings(run)):
        path, before, now = found
        raise UserError(
            f"{run.folder} holds {run.row.name!r} with {path} = {before!r}, but now it is {now!r}; "
            "choose another --out, or delete that folder"
        )


def settings(run: Run) -> Json:
    """Return all that decides what the run learns."""
    return {name: run.recipe[name] for name in ("model", "seed", "stages")}


def execute(run: Run, score: Sequence[str], lock: int) -> None:
    """Train and score a run as far as that is not done; a failure is noted, not raised.

    Args:
        run: its folder is ours (`claim`).
        score: words of `vlm eval` behind the model and before --out.
        lock: see `vlm.child_commands`.

    Raises:
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    make_folder(run.folder)
    note: Json = {"settings": settings(run), "seconds": 0.0, "peak_memory_mb": 0, "starts": 0}
    note |= run.note() | {"failed": None}
    write_flushed(run.folder / RECIPE, to_text(dict(run.recipe)))
    write_note(run.folder / NOTE, note)
    log = run.folder / LOG
    if not run.is_trained:
        note |= {"starts": note["starts"] + 1, "scored": None}
        write_note(run.folder / NOTE, note)
        ended = run_side_by_side([["train", str(run.folder / RECIPE)]], lock, log)
        note["seconds"] = round(note["seconds"] + ended.seconds, 1)
        note["peak_memory_mb"] = max(note["peak_memory_mb"], ended.peak_memory_mb)
        if ended.failed or not run.is_trained:
            _note_failure(run, note, "training", ended.failed)
            return
        write_note(run.folder / NOTE, note)
    words = ["eval", str(run.model), *score, "--out", str(run.scores)]
    ended = run_side_by_side([words], lock, log)
    if ended.failed:
        _note_failure(run, note, "scoring", ended.failed)
        return
    write_note(run.folder / NOTE, note | {"scored": list(score)})


def _note_failure(run: Run, note: Json, step: str, failed: Sequence[tuple[int, int]]) -> None:
    """Write down why a command failed: what it said last."""
    code = failed[0][1] if failed else 0
    if code < 0:
        reason = f"stopped by signal {-code}, as a machine without memory does"
    else:
        text = (run.folder / LOG).read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        reason = said[-1] if said else f"exit code {code}"
    write_note(run.folder / NOTE, note | {"failed": f"{step}: {reason}"})


def _read(path: Path) -> Json:
    """Return a JSON file of ours, {} where there is none yet.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); delete the folder it is in") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} was not written by an ablation; choose another --out")
    return found
