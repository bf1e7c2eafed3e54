"""What is one training of one variant, where does it lie, and what of it is done?

OUT/runs/<row>/seed<n>/
    recipe.yaml     the whole resolved recipe; `vlm train` of it is this very run
    run.json        what is done, how long it took, why it failed
    train/          what `vlm train` writes, a folder per stage
    eval/           what `vlm eval` writes
    log.txt         what both printed
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.ablation.rows import Row
from vlm.done import first_difference
from vlm.errors import UserError
from vlm.file_hash import hash_weights
from vlm.overrides import apply_overrides

NOTE, LOG, RECIPE = "run.json", "log.txt", "recipe.yaml"
Json = dict[str, Any]


@dataclass(frozen=True)
class Scoring:
    """How models are scored.

    Attributes:
        words: of `vlm eval`, behind the model and before --out.
        data: hashes of the benchmark's files.
    """

    words: tuple[str, ...]
    data: tuple[str, ...]

    def to_json(self) -> Json:
        """Return what a run's note holds of it."""
        return {"words": list(self.words), "data": list(self.data)}


@dataclass(frozen=True)
class Run:
    """One training of one row.

    Attributes:
        row: the variant.
        seed: of the training.
        folder: gets all that belongs to the run.
        recipe: the whole recipe as plain values.
        start: hashes of the weights it starts from, by the source's name.
    """

    row: Row
    seed: int
    folder: Path
    recipe: Mapping[str, Any]
    start: Mapping[str, Mapping[str, str]]

    @property
    def name(self) -> str:
        """Return what the run is called in sentences."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def stages(self) -> list[Path]:
        """Return the folders of the stages; the last one's model is scored."""
        return [self.folder / "train" / stage["name"] for stage in self.recipe["stages"]]

    @property
    def model(self) -> Path:
        """Return the folder of the model that is scored."""
        return self.stages[-1]

    @property
    def scores(self) -> Path:
        """Return the folder of the scores."""
        return self.folder / "eval"

    @property
    def settings(self) -> Json:
        """Return all that decides what the run learns."""
        chosen = {name: self.recipe[name] for name in ("model", "seed", "stages")}
        return {**chosen, "start": {name: dict(files) for name, files in self.start.items()}}

    def manifests(self) -> list[Json]:
        """Return what each stage says of itself; {} where it has not begun."""
        return [read_json(folder / "manifest.json") for folder in self.stages]

    def note(self) -> Json:
        """Return run.json, {} where there is none yet."""
        return read_json(self.folder / NOTE)

    @property
    def is_trained(self) -> bool:
        """Return whether the last stage was trained to its end."""
        return self.manifests()[-1].get("status") == "done"

    def is_scored(self, scoring: Scoring) -> bool:
        """Return whether the trained model was scored in this way."""
        return self.is_trained and self.note().get("scored") == scoring.to_json()


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
    runs, hashes = [], {}
    for seed in seeds:
        for row in rows:
            folder = out / "runs" / row.folder / f"seed{seed}"
            tree = copy.deepcopy(dict(base))
            tree |= {"name": row.name, "output_dir": str(folder / "train"), "seed": seed}
            apply_overrides(tree, dict(row.changes))
            sources = sorted(set(_sources(tree["model"])))
            for source in sources:
                if source not in hashes:
                    hashes[source] = hash_weights(Path(source))
            runs.append(Run(row, seed, folder, tree, {name: hashes[name] for name in sources}))
    return runs


def share_features(runs: Sequence[Run], out: Path) -> list[Run]:
    """Return the runs with one cache for the features of frozen encoders, `out/features`.

    A recipe that names a folder itself is left as it is. `vlm train` decides whether the cache
    pays, from how many runs will read it: those with one encoder that sees pictures cut alike.
    """
    readers = Counter(_looks(run) for run in runs)
    shared = []
    for run in runs:
        own = run.recipe["feature_cache"]
        if own["folder"] is None:
            own = {**own, "folder": str(out / "features"), "runs": readers[_looks(run)]}
        shared.append(replace(run, recipe={**run.recipe, "feature_cache": own}))
    return shared


def _looks(run: Run) -> str:
    """Return a text that is the same for runs whose encoders see the same views alike."""
    parts = ("checkpoint", "vision_encoder", "tiling", "dtype")
    return repr([run.recipe["model"][part] for part in parts])


def _sources(model: Any) -> Iterator[str]:
    """Yield the files and folders that a model's weights come from."""
    if isinstance(model, Mapping):
        for key, value in model.items():
            if key in ("source", "language_model", "checkpoint") and isinstance(value, str):
                if Path(value).exists():
                    yield value
            else:
                yield from _sources(value)
    elif isinstance(model, list):
        for item in model:
            yield from _sources(item)


def claim(run: Run) -> None:
    """Refuse a folder that holds a run of other settings.

    Raises:
        UserError: the sentence names one setting that differs.
    """
    note = run.note()
    if "settings" not in note:
        if run.folder.exists() and any(run.folder.iterdir()):
            raise UserError(f"{run.folder} was not written by an ablation; choose another --out")
        return
    if found := first_difference(note["settings"], run.settings):
        path, before, now = found
        raise UserError(
            f"{run.folder} holds {run.row.name!r} with {path} = {before!r}, but now it is {now!r}; "
            "choose another --out, or delete that folder"
        )


def read_json(path: Path) -> Json:
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
