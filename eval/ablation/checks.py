"""Can every row be trained? Asked before the first training, of `vlm train` and of the parts."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.ablation.fit import Fit, Parts
from eval.ablation.runs import Run
from vlm.errors import UserError
from vlm.yaml_values import parse_value, to_text

Json = dict[str, Any]
# Fields whose values are checked by building the parts; all others `vlm train --check` checks.
BUILT = ("model.connector", "model.vision_encoder", "model.language_model")


def check_recipe(recipe: str, overrides: Sequence[str]) -> Json:
    """Return a recipe in full, as `vlm train --check` prints it.

    Raises:
        UserError: it is wrong; the sentence is that of `vlm train`.
    """
    command = [sys.executable, "-m", "vlm", "train", recipe, *overrides, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(said[-1].removeprefix("vlm train: "))
    return parse_value(done.stdout, "vlm train --check")


def check_rows(base: Json, runs: Sequence[Run]) -> dict[str, Fit]:
    """Return what each row's parts are, after checking that it can be trained.

    Args:
        base: the resolved recipe that the rows change.
        runs: one of each row.

    Raises:
        UserError: a row cannot be trained; the sentence names it.
    """
    varied = [key for run in runs for key in run.row.changes if key.startswith(BUILT)]
    if base["model"]["checkpoint"] is not None and varied:
        raise UserError(
            "the recipe starts from model.checkpoint, so its parts cannot be varied "
            f"({varied[0]}); name vision_encoder, connector and language_model instead"
        )
    parts, fits = Parts(), {}
    for run in runs:
        try:
            if not all(key.startswith(BUILT) for key in run.row.changes):
                _check_tree(run)
            _check_order(run)
            fits[run.row.name] = parts.check(run.recipe["model"])
        except UserError as error:
            raise UserError(f"row {run.row.name!r}: {error}") from error
    return fits


def _check_tree(run: Run) -> None:
    """Let `vlm train --check` look at a run's whole recipe."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(to_text(dict(run.recipe)), encoding="utf-8")
        try:
            check_recipe(str(path), [])
        except UserError as error:
            raise UserError(str(error).removeprefix(f"recipe {path}: ")) from error


def _check_order(run: Run) -> None:
    """Refuse what would let the order of records depend on the connector."""
    for stage in run.recipe["stages"]:
        if stage["length_window"] > 1:
            raise UserError(
                f"stages.{stage['name']}.length_window is {stage['length_window']}: the order of "
                "records would then depend on how many tokens a picture takes; set it to 1 or 0"
            )
        if isinstance(stage.get("packed"), dict):
            raise UserError(
                f"stages.{stage['name']}.packed fills rows to a length: which records share a step "
                "would then depend on how many tokens a picture takes; set it to true or false"
            )
