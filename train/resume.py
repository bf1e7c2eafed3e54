"""May a stage go on from what its folder holds? From its own checkpoint, with its own data."""

from pathlib import Path

from train.checkpoints import RECIPE
from train.folders import stage_tree, what_differs
from train.manifest import hash_manifest, hash_sources, read_manifest
from train.process import say
from train.recipe import Recipe, StageRecipe
from vlm.errors import UserError
from vlm.yaml_values import read_file


def check_resume(
    recipe: Recipe, stage: StageRecipe, folder: Path, checkpoint: Path, previous: Path | None
) -> None:
    """Refuse to go on from what is not this stage's own, or where what it rests on has changed.

    Args:
        recipe: of the run.
        stage: that goes on.
        folder: the stage's.
        checkpoint: its newest.
        previous: folder of the stage before.

    Raises:
        UserError: the sentence says what differs.
    """
    written = checkpoint / RECIPE
    if not written.exists():
        raise UserError(
            f"{checkpoint} holds no {RECIPE}, so no stage of ours wrote it: take it out of "
            f"{checkpoint.parent}, or choose another --output_dir"
        )
    wanted = stage_tree(recipe, stage)
    if found := what_differs(read_file(written), wanted):
        path, before, now = found
        raise UserError(
            f"{checkpoint} was written by another run, with {path} = {before!r}, but here it is "
            f"{now!r}: take it out of {checkpoint.parent}, or choose another --output_dir"
        )
    manifest = read_manifest(folder)
    if manifest.get("previous", hash_manifest(previous)) != hash_manifest(previous):
        raise UserError(
            f"stage {stage.name!r} began from another training of {previous} than stands there "
            f"now: delete {folder} to begin it anew, or choose another --output_dir"
        )
    known = manifest.get("validation", {})
    if stage.validation is not None and known:
        changed = known != hash_sources(stage.validation.data.sources)
        if changed:
            say(
                f"validation of stage {stage.name!r}: its data has changed, losses from here on "
                "are of other records"
            )
    before = manifest.get("data", {})
    for name, data in hash_sources(stage.data.sources).items():
        if name in before and before[name] != data:
            raise UserError(
                f"data source {name!r} of stage {stage.name!r} has changed since the stage began "
                f"(see {folder / 'manifest.json'}), so it cannot go on as it would have: put the "
                "old data back, or choose another --output_dir"
            )
