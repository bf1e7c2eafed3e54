"""How does a stage get a frozen encoder's features from disk? Decided, filled, and only then read.

All pictures that the stage will see are encoded before its first step, in passes of one size. So
every step reads; no loss depends on what was stored before, or on when a run was killed.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from data_recipes.captions import CaptionDataset
from data_recipes.dataset import ConversationDataset
from data_recipes.feature_store import FeatureStore
from data_recipes.feature_writer import NoRoomError
from data_recipes.pictures import Shown
from train.features.demand import Looks, demand_of, later_looks
from train.features.fill import fill
from train.features.key import EncoderRun, describe_features, key_of, measure
from train.features.plan import Decision, FeatureCache, Room, budget, decide
from train.manifest import environment, read_manifest
from train.parts import StageParts
from train.process import is_main_process, say
from train.recipe import Recipe, StageRecipe
from vlm.done import write_note
from vlm.errors import UserError

DESCRIPTION = "features.json"  # for people: what the folder's name was made of, and who made it


@dataclass(frozen=True)
class Prepared:
    """What was decided, as the manifest has it, and what the stage then reads from."""

    note: dict[str, Any] | None = None
    store: FeatureStore | None = None


def prepare_features(
    recipe: Recipe,
    stage: StageRecipe,
    parts: StageParts,
    arguments: TrainingArguments,
    earlier: Mapping[str, Any] | None,
) -> Prepared:
    """Decide whether a stage reads features in place of pictures; store what it will read.

    Args:
        recipe: its `feature_cache`; later stages that look at the same pictures count, too.
        stage: the one that is about to train.
        parts: what the stage is run with; frozen already are the parts that it does not train.
        arguments: of the Trainer.
        earlier: what was decided when the stage took its first step; None: it has taken none.

    Raises:
        UserError: the folder cannot be written, or not all ranks see the same one.
    """
    settings, began_with = recipe.feature_cache, earlier is not None and earlier["used"]
    if settings.folder is None and not began_with:
        return Prepared()
    why = "feature_cache.folder is null" if settings.folder is None else refusal(parts, arguments)
    if why is None and earlier is not None and not began_with:
        why = "the stage began without"
    decision, store = Decision(False, why or "", {}), None
    if why is None:
        # As the stage began so it goes on: the last digits of its losses may depend on it.
        settings = replace(settings, mode="always") if began_with else settings
        looks = Looks(parts.dataset, arguments, stage.length_window, stage.packing)
        later = later_looks(recipe, stage, looks) if settings.mode == "auto" else []
        decision, store = _filled_store(settings, parts.model, looks, later)
    if store is None:
        digits = "; from here on the last digits of losses may differ" if began_with else ""
        say(f"features: computed, not stored: {decision.why}{digits}")
    return Prepared({"used": decision.use, "why": decision.why, **decision.numbers}, store)


def features_before(folder: Path, checkpoint: Path | None) -> Mapping[str, Any] | None:
    """Return what was decided before a stage's first step; None where it has taken none."""
    if checkpoint is None:
        return None
    return read_manifest(folder).get("feature_cache") or {"used": False}


def refusal(parts: StageParts, arguments: TrainingArguments) -> str | None:
    """Return why a stage's features cannot be stored, whatever that would save; None: they can."""
    if isinstance(parts.dataset, CaptionDataset):
        return "the stage's objective reads pictures itself"
    trains = [parameter.requires_grad for parameter in parts.model.model.vision_tower.parameters()]
    if not trains:
        return "this encoder computes nothing"
    if any(trains):
        return "the stage trains its encoder"
    if arguments.deepspeed or arguments.fsdp:
        return "DeepSpeed and FSDP keep the encoder in types and places of their own"
    return None


def _filled_store(
    settings: FeatureCache, model: Any, looks: Looks, later: Sequence[Looks]
) -> tuple[Decision, FeatureStore | None]:
    """Return what was decided, and a store that holds all the stage will ask for, or None."""
    root, arguments = Path(settings.folder or ""), looks.arguments
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    tower = model.model.vision_tower.to(arguments.device).eval()
    run = EncoderRun(tower, arguments.device, autocast)
    layout, view_flops = measure(run)
    store = FeatureStore(_make_folder(root, run, looks.dataset), layout)
    times = looks.pictures()
    shown = list(times)
    todo = looks.missing(store, shown, arguments.process_index)
    missing, view_bytes = looks.sum(looks.estimate(store, todo)), layout.entry_bytes(1)
    demand = demand_of(model, looks, times, missing, later, view_flops, view_bytes)
    room = _room(root, looks)
    decision = decide(settings, demand, room)
    if not decision.use:
        return decision, None
    say(f"features: read from {store.folder}, {decision.why}")
    unreadable = _fill(store, todo, run, looks, budget(settings, room) // arguments.world_size)
    if looks.sum(unreadable is None):
        why = f"max_gb {settings.max_gb:g} or the disk left no room for the last of them"
        return replace(decision, use=False, why=why), None
    store = FeatureStore(store.folder, layout)
    if arguments.world_size > 1:
        _check_all_see(store, shown, looks, unreadable or 0)
    return decision, store


def _check_all_see(
    store: FeatureStore, shown: Sequence[Shown], looks: Looks, unreadable: int
) -> None:
    """Look for what the next rank was to store; a picture of its own disk is known by its bytes.

    Raises:
        UserError: on some rank, which ends all, the features are not there.
    """
    neighbour = looks.arguments.process_index + 1
    left = looks.sum(len(looks.missing(store, shown, neighbour, reading=True)))
    if left > looks.sum(unreadable):
        raise UserError(
            f"feature_cache.folder {store.folder.parent}: what one rank stored there another does "
            "not see; choose a folder on a disk that all machines share"
        )


def _fill(
    store: FeatureStore, todo: list[Shown], run: EncoderRun, looks: Looks, allowed: int
) -> int | None:
    """Store this rank's share; return how many files could not be read, None: there was no room."""
    workers, processor = looks.arguments.dataloader_num_workers, looks.dataset.processor
    try:
        return fill(
            store, todo, run, processor.image_processor, workers, allowed, is_main_process()
        )
    except NoRoomError:
        return None


def _make_folder(root: Path, run: EncoderRun, dataset: ConversationDataset) -> Path:
    """Return the folder of an encoder's features, made if need be.

    Raises:
        UserError: it cannot be made.
    """
    description = describe_features(run, dataset.processor.image_processor)
    folder = root / key_of(description)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process() and not (folder / DESCRIPTION).exists():
            note = {"features": description, "first_writer": environment(run.device)}
            write_note(folder / DESCRIPTION, note)
    except OSError as error:
        raise UserError(
            f"feature_cache.folder {root} cannot be written ({error.strerror}); choose another "
            "with --feature_cache.folder"
        ) from error
    return folder


def _room(root: Path, looks: Looks) -> Room:
    """Return what the folder holds and its disk has left, as the main rank sees it."""
    used = free = 0
    if is_main_process():
        kinds = ("features", "entries", "files")
        used = sum(path.stat().st_size for kind in kinds for path in root.glob(f"*/*.{kind}"))
        free = shutil.disk_usage(root).free
    return Room(looks.sum(used), looks.sum(free))
