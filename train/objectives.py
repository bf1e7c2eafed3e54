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

    Attributes:
        shared_dim: width of the space in which pictures and captions are compared.
        tokenizer: folder or hub id of the Q-Former's own, such as google-bert/bert-base-uncased;
            None: the words of the captions, at most as many as the connector's vocab_size.
        bert: folder or hub id of a BERT of the Q-Former's sizes to start from, as BLIP-2 does.
        held_out: sources of captions to measure on when the stage ends.
    """

    shared_dim: int = 256
    tokenizer: str | None = None
    bert: str | None = None
    held_out: list[Source] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_positive("objective 'qformer_stage1'", shared_dim=self.shared_dim)
        if self.bert is not None and self.tokenizer is None:
            raise UserError(
                "objective 'qformer_stage1': bert gives weights for the words of its own "
                "tokenizer; set tokenizer too, most often to the same"
            )


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
            f"objective 'qformer_stage1' trains the model's one connector of type qformer, but "
            f"the connector is {types}"
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
            place = f"{where}: stages.{stage.name}"
            if model.checkpoint is not None:
                raise UserError(f"{place}: objective 'qformer_stage1' starts from model's parts")
            if before := [earlier.name for earlier in stages[:number] if earlier.name in usual]:
                raise UserError(
                    f"{place}: objective 'qformer_stage1' comes before the language model, but "
                    f"stage {before[0]!r} stands before it"
                )
            _check_first_stage(model, stage, place)


def _check_first_stage(model: "ModelRecipe", stage: "StageRecipe", place: str) -> None:
    """Refuse what a first stage of the Q-Former does not have."""
    if set(stage.trainable) != {"connector"}:
        raise UserError(
            f"{place}: objective 'qformer_stage1' trains the connector alone, not "
            f"{', '.join(stage.trainable)}"
        )
    if stage.chat_template is not None:
        raise UserError(f"{place}: objective 'qformer_stage1' reads captions, no chat_template")
    if stage.training.get("gradient_checkpointing"):
        raise UserError(f"{place}: objective 'qformer_stage1' has no gradient_checkpointing")
    one_process = os.environ.get("WORLD_SIZE", "1") == "1"
    if stage.training.get("per_device_train_batch_size") == 1 and one_process:
        raise UserError(
            f"{place}: objective 'qformer_stage1' compares the pairs of a step with each other; "
            "set training.per_device_train_batch_size to 2 or more"
        )
    for source in stage.data.sources:
        if source.image_position == "none":
            raise UserError(f"{place}: data source {source.name!r} leaves the pictures out")
    try:
        qformer_of(model.connector)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
