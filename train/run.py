"""How is a recipe run? This file is the table of contents; every line leads to the file that knows.

vlm train RECIPE
torchrun --nproc-per-node 8 -m train RECIPE
deepspeed --module train RECIPE --stage align
"""

from pathlib import Path
from typing import Any

from train.adapted import describe_base, keeps_base, require_packages
from train.arguments import check_arguments, training_arguments
from train.benchmark import check_words, tell_failures
from train.checkpoints import damaged, newest
from train.data import check_data
from train.engine import forget_engine
from train.features.cache import features_before, prepare_features
from train.folders import check_space, claim, is_done, output_of
from train.freeze import Group, describe, freeze, settings
from train.loop import make_trainer, train_to_end
from train.manifest import StageManifest, read_manifest
from train.order import make_order
from train.parts import stage_parts, with_features
from train.process import free_memory, is_main_process, say, seed_everything, set_up_torch
from train.rates import check_steps
from train.recipe import Recipe, StageRecipe, with_place
from train.resume import check_resume
from train.sharded_state import check_ranks, step_of_records
from train.steps import check_batches, step_sizes, total_steps
from vlm.errors import UserError


def run(recipe: Recipe, only: str | None = None) -> Path:
    """Run all stages, or the one named `only`; return the last one's folder.

    Stages that are done are kept, a stage that was cut short goes on from its newest checkpoint.

    Raises:
        UserError: the recipe, the data or the output folder is wrong.
        KeyboardInterrupt: the user stopped the run; what is done is saved.
    """
    chosen = check(recipe, only)
    set_up_torch(recipe)
    folders = [Path(recipe.output_dir) / stage.name for stage in recipe.stages]
    with output_of(recipe):
        for stage, folder, previous in zip(recipe.stages, folders, [None, *folders], strict=False):
            if stage in chosen:
                run_stage(recipe, stage, folder, previous)
    for stage in chosen:
        tell_failures(Path(recipe.output_dir) / stage.name)
    return Path(recipe.output_dir) / chosen[-1].name


def check(recipe: Recipe, only: str | None = None) -> list[StageRecipe]:
    """Check what can be checked before anything is loaded; return the stages to run.

    Raises:
        UserError: an argument of a stage, a file of its data, or its benchmark is wrong.
    """
    chosen = recipe.stages if only is None else [recipe.stage(only)]
    for stage in chosen:
        require_packages(recipe, stage)
        check_arguments(recipe, stage)
        check_data(stage, recipe.seed)
        if stage.benchmark is not None:
            with_place(f"stages.{stage.name}.benchmark", check_words, stage.benchmark.words())
    return chosen


def run_stage(recipe: Recipe, stage: StageRecipe, folder: Path, previous: Path | None) -> None:
    """Run one stage: from its own checkpoint, the stage before, or the components, to its end."""
    if previous is not None and not is_done(previous):
        raise UserError(
            f"stage {stage.name!r} starts from {previous}, which is not done; run without --stage, "
            f"or first with --stage {previous.name}"
        )
    if claim(recipe, stage, folder):
        say(f"stage {stage.name}: done before, kept in {folder}")
        return
    free_memory()
    forget_engine()
    checkpoint = newest(folder / "checkpoints")
    for path in damaged(folder / "checkpoints"):
        say(f"{path} has lost a part since it was written, and is passed over; look at the disk")
    if checkpoint is not None and is_main_process():
        check_resume(recipe, stage, folder, checkpoint, previous)
    seed_everything(recipe.seed)
    parts = stage_parts(recipe, stage, previous, checkpoint)
    groups = freeze_stage(recipe, stage, parts.model)
    arguments = training_arguments(recipe, stage, folder)
    if checkpoint is not None:
        check_ranks(checkpoint, read_manifest(folder), arguments)
    saves, on_base = arguments.save_strategy != "no", keeps_base(recipe, stage)
    check_space(folder, parts.model, saves, stage.ema is not None, trained_only=on_base)
    if stage.packing is None:
        check_batches(step_sizes(arguments, len(parts.dataset)), stage.name)
    if stage.changes:
        order = make_order(parts.dataset, arguments, stage.length_window, stage.packing)
        steps = total_steps(arguments, step_sizes(arguments, len(order)))
        check_steps(stage.changes, steps, f"stages.{stage.name}")

    say(f"stage {stage.name}: {len(parts.dataset)} records an epoch, result in {folder}")
    say("\n".join(describe(parts.model, stage.trainable)))
    for change in stage.changes:
        say(
            "\n".join([f"from step {change.at_step} on:", *describe(parts.model, change.trainable)])
        )
    if on_base:
        say(describe_base(parts.model))
    before = features_before(folder, checkpoint)
    found = prepare_features(recipe, stage, parts, arguments, before)
    step_of, note = step_of_records(arguments), found.note
    manifest = StageManifest(folder, recipe, stage, arguments.device, note, previous, step_of)
    parts = with_features(parts, stage, found.store)
    trainer = make_trainer(stage, folder, parts, groups, arguments, manifest, recipe.seed)
    weights = "trained" if stage.ema is None else stage.ema.use
    train_to_end(trainer, checkpoint, folder, manifest, weights)


def freeze_stage(recipe: Recipe, stage: StageRecipe, model: Any) -> list[Group]:
    """Freeze what the stage never trains, and return the optimizer's groups.

    Raises:
        UserError: this stage or a later one names layers that the model does not have.
    """
    for later in recipe.stages[recipe.stages.index(stage) + 1 :]:
        for phase in later.phases:
            with_place(f"stages.{later.name}", settings, model, phase)
    return with_place(f"stages.{stage.name}", freeze, model, stage.trainable, stage.phases[1:])
