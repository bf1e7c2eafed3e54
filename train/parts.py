"""What does a stage's objective need? A model, a processor, batches, a Trainer to run them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_recipes.dataset import Collator, ConversationDataset
from data_recipes.feature_store import FeatureStore
from train.build import build_model
from train.data import stage_dataset
from train.objectives import QFormerStage1
from train.recipe import Recipe, StageRecipe
from train.trainer import VlmTrainer
from vlm.long_context import context_length


@dataclass(frozen=True)
class StageParts:
    """What a stage is run with.

    Attributes:
        model: on the CPU; the Trainer moves it.
        dataset: decides the order; its `processor` is saved with the model.
        collate: makes batches of its items.
        trainer: called with what every stage's Trainer takes.
    """

    model: Any
    dataset: ConversationDataset
    collate: Callable[..., dict[str, Any]]
    trainer: Callable[..., VlmTrainer]


def stage_parts(
    recipe: Recipe, stage: StageRecipe, previous: Path | None, checkpoint: Path | None
) -> StageParts:
    """Return what a stage is run with.

    Args:
        recipe: its `model` is what the first stage starts from.
        stage: its objective decides.
        previous: folder of the stage before, None for the first.
        checkpoint: the stage's own newest checkpoint, None for a fresh start.

    Raises:
        UserError: a component cannot be found or does not fit; the sentence says which.
    """
    if isinstance(stage.aim, QFormerStage1):
        return _first_stage(recipe, stage, stage.aim, previous, checkpoint)
    model, processor = build_model(recipe, stage, previous, checkpoint)
    positions = context_length(model.config.text_config)
    dataset = stage_dataset(stage, processor, recipe.seed, positions)
    collate = Collator(processor, bool(stage.packed), loss_weight=stage.loss_weight)
    return StageParts(model, dataset, collate, VlmTrainer)


def with_features(parts: StageParts, stage: StageRecipe, store: FeatureStore | None) -> StageParts:
    """Return the parts with a frozen encoder's features, if there are any, in place of pictures."""
    if store is None:
        return parts
    parts.dataset.features = store
    assert isinstance(parts.collate, Collator)
    return replace(parts, collate=replace(parts.collate, features=store))


def _first_stage(
    recipe: Recipe,
    stage: StageRecipe,
    aim: QFormerStage1,
    previous: Path | None,
    checkpoint: Path | None,
) -> StageParts:
    """Return what BLIP-2's first stage is run with."""
    from data_recipes.captions import CaptionCollator
    from train.pair_trainer import PairTrainer
    from train.qformer_stage1 import build_first_stage, caption_dataset

    dataset = caption_dataset(recipe, stage, stage.data.sources, stage.data.on_error)
    model, dataset.processor = build_first_stage(recipe, aim, dataset, checkpoint or previous)
    held_out = None
    if aim.held_out:
        # At a stage's end a bad record must not cost the stage; how many there are is told.
        held_out = caption_dataset(recipe, stage, aim.held_out, "skip")
        held_out.processor = dataset.processor
    trainer = partial(PairTrainer, held_out=held_out)
    return StageParts(model, dataset, CaptionCollator(dataset.processor), trainer)
