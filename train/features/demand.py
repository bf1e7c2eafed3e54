"""What does a stage ask of its encoder, and which other stages of the run will ask the same?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from data_recipes.dataset import ConversationDataset
from data_recipes.feature_store import FeatureStore
from data_recipes.pictures import Shown, is_stored
from train.arguments import training_arguments
from train.data import stage_dataset
from train.features.plan import Demand
from train.features.work import SAMPLE, mean_work
from train.objectives import NextToken
from train.order import make_order, seen_spans
from train.packing import Packing
from train.recipe import Recipe, StageRecipe
from train.steps import loaded_ahead, step_sizes, total_steps


@dataclass(frozen=True)
class Looks:
    """How a stage will look at pictures.

    Attributes:
        dataset: its records.
        arguments: of its Trainer.
        length_window: the recipe's.
        packing: the recipe's.
    """

    dataset: ConversationDataset
    arguments: TrainingArguments
    length_window: int
    packing: Packing | None

    def spans(self) -> list[tuple[int, int]]:
        """Return the positions [start, stop) of the mixture that the stage will ask for."""
        order = make_order(self.dataset, self.arguments, self.length_window, self.packing)
        steps = total_steps(self.arguments, step_sizes(self.arguments, len(order)))
        return seen_spans(order, self.arguments, steps, loaded_ahead(self.arguments))

    def pictures(self) -> dict[Shown, int]:
        """Return how often it looks at each picture."""
        return self.dataset.pictures(self.spans())

    def missing(
        self, store: FeatureStore, shown: Sequence[Shown], rank: int, reading: bool = False
    ) -> list[Shown]:
        """Return those of a rank's share of pictures that are not stored, or in unknown files.

        Unknown files count as far as their pictures are not stored, with `reading`.
        """
        processor, world = self.dataset.processor.image_processor, self.arguments.world_size
        share = shown[rank % world :: world]
        return [each for each in share if not is_stored(each, processor, store, reading)]

    def estimate(self, store: FeatureStore, unknown: Sequence[Shown]) -> int:
        """Return about how many of these are not stored, from a few that are read.

        Pictures that were moved, or copied with the features, lie in unknown files.
        """
        processor = self.dataset.processor.image_processor
        few = unknown[:: max(1, -(-len(unknown) // SAMPLE))]
        new = sum(not is_stored(each, processor, store, reading=True) for each in few)
        return -(-len(unknown) * new // max(1, len(few)))

    def sum(self, number: int) -> int:
        """Return the sum of a number over all ranks."""
        if self.arguments.world_size == 1:
            return number
        total = torch.tensor(float(number), dtype=torch.float64, device=self.arguments.device)
        torch.distributed.all_reduce(total)
        return int(total.item())


def later_looks(recipe: Recipe, stage: StageRecipe, now: Looks) -> list[Looks]:
    """Return those of later stages of a run that look through the same encoder in the same way."""
    found = []
    for later in recipe.stages[recipe.stages.index(stage) + 1 :]:
        if "vision_tower" in later.ever_trained:
            break  # from there on it is another encoder
        if not isinstance(later.aim, NextToken) or {"deepspeed", "fsdp"} & set(later.training):
            continue
        arguments = training_arguments(recipe, later, Path(recipe.output_dir) / later.name)
        if (arguments.bf16, arguments.fp16) == (now.arguments.bf16, now.arguments.fp16):
            dataset = stage_dataset(later, now.dataset.processor, recipe.seed)
            found.append(Looks(dataset, arguments, later.length_window, later.packing))
    return found


def demand_of(
    model: Any,
    looks: Looks,
    times: Mapping[Shown, int],
    missing: int,
    later: Sequence[Looks],
    view_flops: float,
    view_bytes: int,
) -> Demand:
    """Return what a stage asks for, in numbers.

    Args:
        model: the stage's.
        looks: the stage's.
        times: how often it looks at each picture.
        missing: how many of them are not stored.
        later: those of later stages.
        view_flops: of encoding a view.
        view_bytes: of a view's features.
    """
    spans = looks.spans()
    shown = (spans[0][0], min(spans[-1][1], len(looks.dataset))) if spans else (0, 0)
    recomputed = bool(looks.arguments.activation_checkpointing)
    work = mean_work(model, looks.dataset, shown, recomputed)
    readings = sum(times.values())
    again = [counts for each in later for counts in each.pictures().items()]
    return Demand(
        readings=readings,
        pictures=len(times),
        missing=missing,
        later=sum(count for shown, count in again if shown in times),
        encoder_flops=readings * work.views_per_picture * view_flops,
        other_flops=sum(stop - start for start, stop in spans) * work.other_flops,
        picture_bytes=work.views_per_picture * view_bytes,
    )
