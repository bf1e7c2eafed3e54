"""Which records does a stage see? Its dataset, checked early, and notes of what was left out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_recipes.dataset import ConversationDataset, Skipped, image_root
from data_recipes.mixture import Mixture, Source
from data_recipes.readers import open_records
from train.objectives import QFormerStage1
from train.recipe import DataRecipe, StageRecipe
from vlm.errors import UserError


def check_data(stage: StageRecipe, seed: int) -> None:
    """Open every file of a stage, so that a wrong path is told before an earlier stage trains.

    Raises:
        UserError: a file or folder is missing, or holds no records.
    """
    _check_sources(stage.data.sources, f"stages.{stage.name}.data", seed)
    if stage.validation is not None:
        where = f"stages.{stage.name}.validation.data"
        _check_sources(stage.validation.data.sources, where, seed)
    if stage.benchmark is not None:
        for file in stage.benchmark.data:
            if not Path(file).is_file():
                raise UserError(f"stages.{stage.name}.benchmark.data: {file} is no file")
    if isinstance(stage.aim, QFormerStage1) and stage.aim.held_out:
        _check_sources(stage.aim.held_out, f"stages.{stage.name}.objective.held_out", seed)


def _check_sources(sources: Sequence[Source], where: str, seed: int) -> None:
    """Open every file of some sources; `where` names them in errors."""
    try:
        lengths = [len(open_records(source.path)) for source in sources]
        Mixture(sources, lengths, seed)
        for source in sources:
            if not image_root(source).is_dir():
                raise UserError(
                    f"data source {source.name!r}: image_root {source.image_root} is no folder"
                )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def stage_dataset(
    stage: StageRecipe, processor: Any, seed: int, positions: int | None = None
) -> ConversationDataset:
    """Return the stage's dataset, see `dataset_of`."""
    return dataset_of(stage, stage.data, processor, seed, positions)


def dataset_of(
    stage: StageRecipe, data: DataRecipe, processor: Any, seed: int, positions: int | None = None
) -> ConversationDataset:
    """Return records as a stage sees them.

    Args:
        stage: says how long a row may be.
        data: the records.
        processor: of the stage's model.
        seed: the run's.
        positions: how many the language model knows; None: it has no limit, or none is asked for.
    """
    return ConversationDataset(
        data.sources,
        processor,
        seed=seed,
        on_error=data.on_error,
        max_length=longest_record(stage, positions),
    )


def longest_record(stage: StageRecipe, positions: int | None) -> int | None:
    """Return the most tokens of a stage's record; None: any number."""
    limits = [stage.max_length, stage.packing and stage.packing.length, positions]
    return min((limit for limit in limits if limit is not None), default=None)


class SkipNotes:
    """Appends every skipped record to a file of this rank, and says so once each."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"skipped.{rank}.jsonl"

    def __call__(self, skipped: Skipped) -> None:
        """Note one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(skipped)) + "\n")
        print(f"skipped: {skipped.reason}", file=sys.stderr)
