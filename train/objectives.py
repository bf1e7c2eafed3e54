"""What does a stage learn by? The objectives there are, their fields, and what each needs.

A stage says `objective: {type: qformer_stage1, ...}`; without one it is `next_token`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from connectors.config import check_positive, config_from_mapping
from connectors.registry import lookup
from data_recipes.mixture import Source, parse_sources
from vlm.errors import UserError

if TYPE_CHECKING:
    from train.recipe import ModelRecipe, StageRecipe


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """The usual: the language model learns to say the supervised tokens of conversations."""


@dataclass(frozen=True, kw_only=True)
class QFormerStage1:
    """BLIP-2's first stage: a Q-Former learns on pictures and captions, without a language model.

    Captions are read in the words of the connector's `tokenizer`, such as google-bert's
    bert-base-uncased; without one, in their own most frequent words, at most `vocab_size`.

    Attributes:
        shared_dim: width of the space in which pictures and captions are compared.
        bert: folder or hub id of a BERT of the Q-Former's sizes to start from, as BLIP-2 does.
        held_out: sources of captions to measure on when the stage ends.
    """

    shared_dim: int = 256
    bert: str | None = None
    held_out: list[Source] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_positive("objective 'qformer_stage1'", shared_dim=self.shared_dim)


Objective = NextToken | QFormerStage1
OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "qformer_stage1": QFormerStage1,
}


def parse_objective(value: Any, where: str) -> Objective:
    """Return the objective that a mapping with a `type` names; None is the usual one.

    Raises:
        UserError: unknown type or field, or a value of the wrong type.
    """
    if value is None:
        return NextToken()
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise UserError(
            f"{where} must be a mapping with a 'type', such as {{type: qformer_stage1}}, not "
            f"{value!r}; choose a type from {', '.join(OBJECTIVES)}"
        )
    values = dict(value)
    name = values.pop("type")
    try:
        objective_class = lookup("objective", name, OBJECTIVES)
        if values.get("held_out"):
            values["held_out"] = parse_sources(values["held_out"], "held_out")
        return config_from_mapping(objective_class, values, f"objective {name!r}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def resolve_objective(value: Any, where: str) -> dict[str, Any] | None:
    """Return the mapping with every default written out, as a run's recipe.yaml keeps it."""
    objective = parse_objective(value, where)
    return None if value is None else {"type": value["type"], **asdict(objective)}


def qformer_of(connector: Any) -> dict[str, Any]:
    """Return the one entry of type 'qformer' of a recipe's connector, or list of connectors.

    Raises:
        UserError: there is none, or there are several.
    """
    entries = connector if isinstance(connector, Sequence) else [connector]
    found = [entry for entry in entries if entry["type"] == "qformer"]
    if len(found) != 1:
        types = ", ".join(entry["type"] for entry in entries)
        raise UserError(
            f"trains the model's one connector of type qformer, but the connector is {types}"
        )
    return dict(found[0])


def check_objectives(model: "ModelRecipe", stages: Sequence["StageRecipe"], where: str) -> None:
    """Refuse stages that cannot follow each other, or lack what their objective needs.

    Raises:
        UserError: the sentence says which stage and why.
    """
    usual = [stage.name for stage in stages if isinstance(stage.aim, NextToken)]
    if usual and model.checkpoint is None and model.language_model is None:
        raise UserError(
            f"{where}: model needs language_model (or a checkpoint to go on from), because stage "
            f"{usual[0]!r} trains one"
        )
    for number, stage in enumerate(stages):
        if isinstance(stage.aim, QFormerStage1):
            before = [earlier.name for earlier in stages[:number] if earlier.name in usual]
            place = f"{where}: stages.{stage.name}: objective 'qformer_stage1'"
            _check_first_stage(model, stage, stage.aim, before, place)


def _check_first_stage(
    model: "ModelRecipe", stage: "StageRecipe", aim: QFormerStage1, before: list[str], place: str
) -> None:
    """Refuse what a first stage of the Q-Former cannot do.

    Args:
        model: of the recipe.
        stage: the first stage.
        aim: its objective.
        before: stages of a language model that stand before it.
        place: begins each sentence.
    """
    if model.checkpoint is not None:
        raise UserError(f"{place} starts from the model's parts, not from a checkpoint")
    try:
        qformer = qformer_of(model.connector)
    except UserError as error:
        raise UserError(f"{place} {error}") from error
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    of_one = stage.training.get("per_device_train_batch_size") == 1
    no_words = qformer.get("tokenizer") is None
    blind = [source.name for source in stage.data.sources if source.image_position == "none"]
    parts = ", ".join(stage.ever_trained)
    faults = {
        f"comes before the language model, but {before} stand before it": bool(before),
        f"trains the connector alone, not {parts}": parts != "connector",
        "reads captions and takes no chat_template": stage.chat_template is not None,
        "has no gradient_checkpointing": bool(stage.training.get("gradient_checkpointing")),
        "compares the pairs of a step with each other; set "
        "training.per_device_train_batch_size to 2 or more": of_one and alone,
        f"needs the pictures that data sources {blind} leave out": bool(blind),
        "reads instructions in the words of a tokenizer that the connector, with instruction: "
        "true, has to name; set its tokenizer": no_words and bool(qformer.get("instruction")),
        "starts from a bert that knows the words of its own tokenizer; set the connector's "
        "tokenizer": no_words and aim.bert is not None,
    }
    for sentence, wrong in faults.items():
        if wrong:
            raise UserError(f"{place} {sentence}")
