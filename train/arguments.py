"""How does a stage's `training:` become transformers.TrainingArguments, names and types checked?"""

import os
import typing
from dataclasses import fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from connectors.config import check_value
from connectors.registry import lookup
from train.engine import be_the_only_rank, check_fsdp, deepspeed_config
from train.recipe import Recipe, StageRecipe, with_place
from vlm.errors import UserError

# What the suite starts from; a recipe may change each of them.
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",  # TensorBoard is always written; this adds others
    "dataloader_persistent_workers": True,
}
# What the trainer relies on; a recipe that names one is told where the choice stands instead.
FIXED: dict[str, Any] = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
    "label_names": ["labels"],
    "average_tokens_across_devices": True,
    "ignore_data_skip": False,
}
ELSEWHERE: dict[str, str] = {
    "output_dir": "it is the recipe's output_dir",
    "learning_rate": "learning rates stand beside the parts, in the stage's trainable",
    "seed": "it is the recipe's seed",
    "data_seed": "it is the recipe's seed",
    "resume_from_checkpoint": "a stage that was cut short goes on by itself",
    "group_by_length": "it is the stage's length_window",
    "train_sampling_strategy": "it is the stage's length_window",
    **dict.fromkeys(FIXED, "the trainer sets it"),
}
EXTRAS = "the extra packages for training come with: make extras EXTRAS=train"


def training_arguments(recipe: Recipe, stage: StageRecipe, folder: Path) -> Any:
    """Return the stage's TrainingArguments.

    Args:
        recipe: for the seed.
        stage: its `training` is checked field by field.
        folder: where checkpoints and logs of the stage go.

    Raises:
        UserError: unknown field, wrong type, a combination that transformers refuses, several GPUs
            for one process, or a package that the arguments need is not installed.
    """
    import torch
    from transformers import TrainingArguments

    where = f"stages.{stage.name}.training"
    values = check_fields(stage.training, where)
    arguments = {**DEFAULTS, **values, **FIXED}
    arguments.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if stage.changes:  # what a change freezes gets no gradient, and ranks must not wait for it
        arguments.setdefault("ddp_find_unused_parameters", True)
    if not arguments.get("dataloader_num_workers"):
        arguments["dataloader_persistent_workers"] = False
    if arguments.get("deepspeed"):
        _require_deepspeed(where)
        arguments["deepspeed"] = deepspeed_config(arguments["deepspeed"], where)
    if arguments.get("fsdp"):
        check_fsdp(arguments.get("fsdp_config"), where)
    if arguments.get("deepspeed") or arguments.get("fsdp"):
        be_the_only_rank()
    told_to = arguments["report_to"]
    if "wandb" in ([told_to] if isinstance(told_to, str) else told_to or []):
        _require_wandb(where)
    try:
        made = TrainingArguments(
            output_dir=str(folder / "checkpoints"), seed=recipe.seed, **arguments
        )
    except ImportError as error:
        raise UserError(f"{where}: {error}; {EXTRAS}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    if made.n_gpu > 1:
        raise UserError(
            f"one process sees {made.n_gpu} GPUs; start one process for each with "
            "train/launch/torchrun.sh, or let it see one alone with train/launch/one_gpu.sh"
        )
    return made


def check_arguments(recipe: Recipe, stage: StageRecipe) -> None:
    """Tell mistakes in a stage's `training` before an earlier stage spends a day.

    Under a launcher, and for an engine that needs one, only names, types and the engine's settings
    are checked: making TrainingArguments joins the ranks.

    Raises:
        UserError: as `training_arguments`.
    """
    where = f"stages.{stage.name}.training"
    values = check_fields(stage.training, where)
    if values.get("deepspeed"):
        _require_deepspeed(where)
        deepspeed_config(values["deepspeed"], where)
    elif values.get("fsdp"):
        check_fsdp(values.get("fsdp_config"), where)
    elif "RANK" not in os.environ:
        arguments = training_arguments(recipe, stage, Path(recipe.output_dir) / stage.name)
        _check_optimizer(arguments, where)


def _check_optimizer(arguments: Any, where: str) -> None:
    """Ask for the library of `optim`, which the Trainer asks for when the model is loaded.

    Raises:
        UserError: it is not installed.
    """
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise UserError(f"{where}.optim: {error}; {EXTRAS}") from error


def check_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check names and types against TrainingArguments' own annotations."""
    from transformers import TrainingArguments

    known = {field.name: field for field in fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments) | {"fsdp": bool | str | None}
    for name in values:
        if name in ELSEWHERE:
            raise UserError(f"{where}: {name} cannot be set here; {ELSEWHERE[name]}")
    for name in values:
        if name not in known:
            _unknown(name, list(known), where)
    for name, value in values.items():
        _check_choice(value, hints[name], f"{where}.{name}")
    return {
        name: check_value(value, hints[name], f"{where}.{name}") for name, value in values.items()
    }


def _check_choice(value: Any, hint: Any, where: str) -> None:
    """Check a text that stands for a member of an Enum, as in `SchedulerType | str`."""
    for kind in typing.get_args(hint):
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            with_place(where, lookup, "choice", value, {member.value: member for member in kind})


def _unknown(name: str, known: list[str], where: str) -> None:
    try:
        lookup("field", name, dict.fromkeys(known))
    except UserError as error:
        sentence = str(error).partition("; choose from")[0]
        raise UserError(f"{where}: {sentence}, see transformers.TrainingArguments") from error


def _require_deepspeed(where: str) -> None:
    if find_spec("deepspeed") is None:
        raise UserError(
            f"{where}.deepspeed needs deepspeed, which comes with: make extras EXTRAS=train"
        )


def _require_wandb(where: str) -> None:
    if find_spec("wandb") is None:
        raise UserError(
            f"{where}.report_to: wandb is not installed, which .venv/bin/pip install wandb mends"
        )
