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
from train.engine import (
    be_the_only_rank,
    check_fsdp,
    deepspeed_config,
    without_compiling,
)
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
    "warmup_ratio": "a warmup_steps below 1 is a share of all steps",
    **dict.fromkeys(FIXED, "the trainer sets it"),
}
# What would run beside the suite's own way, or against it: the reason, and the fields.
NOT_HERE: dict[str, tuple[str, ...]] = {
    "it is the stage's validation and benchmark that measure": (
        *("do_eval", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    ),
    "a stage goes on from whole checkpoints alone": ("save_only_model",),
    "other batches are other steps; `vlm plan` tells which fit": ("auto_find_batch_size",),
    "the trainer decides how records come to the processes": ("accelerator_config",),
    "the loss is the stage's, in chunks": ("label_smoothing_factor", "use_liger_kernel"),
    "all machines share output_dir": ("save_on_each_node",),
    "nothing is sent anywhere; `hf upload` takes a stage's folder": (
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
        *("hub_always_push", "hub_revision"),
    ),
}
ELSEWHERE |= {name: reason for reason, names in NOT_HERE.items() for name in names}
# Numbers that transformers takes as they are, and fails at, or trains nothing with, hours later.
LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
    "weight_decay": 0,
    "max_grad_norm": 0,
}
MOST_WORKERS = 256  # processes, each of which holds torch
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
        if not torch.accelerator.is_available():
            arguments["deepspeed"] = without_compiling(arguments["deepspeed"])
    if arguments.get("fsdp"):
        check_fsdp(arguments.get("fsdp_config"), where)
    if arguments.get("deepspeed") or arguments.get("fsdp"):
        be_the_only_rank()
    _settle_device(arguments, where)
    _check_reports(arguments["report_to"], f"{where}.report_to")
    try:
        made = TrainingArguments(
            output_dir=str(folder / "checkpoints"), seed=recipe.seed, **arguments
        )
    except ImportError as error:
        raise UserError(f"{where}: {error}; {EXTRAS}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    _check_processes(made, where)
    _check_optimizer(made, where)
    return made


def _settle_device(arguments: dict[str, Any], where: str) -> None:
    """Say that there is no GPU, where there is none.

    Else bf16 is refused, and accelerate takes each of several processes for the only one.

    Raises:
        UserError: fp16 on a CPU, which would train in float32 without a word.
    """
    import torch

    if not torch.accelerator.is_available():
        arguments.setdefault("use_cpu", True)
    if arguments.get("fp16") and arguments.get("use_cpu"):
        raise UserError(f"{where}.fp16 has no effect on a CPU; take bf16, or leave it out")


def _check_processes(arguments: Any, where: str) -> None:
    """Refuse to start where not every process has one device, and knows of all the others.

    Raises:
        UserError: one process sees several GPUs, or several processes take each for the only one.
    """
    if arguments.n_gpu > 1:
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs; start one process for each with "
            "train/launch/torchrun.sh, or let it see one alone with train/launch/one_gpu.sh"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != started:  # each would train alone, and write the others' files
        raise UserError(
            f"{started} processes were started, but transformers sees {arguments.world_size}; set "
            f"{where}.use_cpu to true where there are no GPUs"
        )


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
        training_arguments(recipe, stage, Path(recipe.output_dir) / stage.name)


def _check_optimizer(arguments: Any, where: str) -> None:
    """Make optimizer and schedule of one number, as the Trainer does once the model is loaded.

    Raises:
        UserError: the optimizer's library is not installed, or what it or the schedule is given
            does not fit.
    """
    import torch
    from transformers import Trainer, get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made = kind([weight], **values)
    except ImportError as error:
        raise UserError(f"{where}.optim: {error}; {EXTRAS}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: optim {arguments.optim.value} refuses: {error}") from error
    kind, options = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        get_scheduler(kind, made, 0, 10, options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}.lr_scheduler_kwargs: {kind.value} refuses: {error}") from error


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
    checked = {
        name: check_value(value, hints[name], f"{where}.{name}") for name, value in values.items()
    }
    _check_numbers(checked, where)
    return checked


def _check_numbers(values: dict[str, Any], where: str) -> None:
    """Refuse numbers that no stage can be trained with."""
    for name, least in LEAST.items():
        if values.get(name) is not None and values[name] < least:
            raise UserError(f"{where}.{name} must be {least:g} or more, not {values[name]:g}")
    workers = values.get("dataloader_num_workers") or 0
    if workers > MOST_WORKERS:
        raise UserError(f"{where}.dataloader_num_workers is {workers}; take {MOST_WORKERS} at most")
    for name in ("save_steps", "logging_steps"):
        if values.get(name) is not None and not values[name] > 0:
            raise UserError(f"{where}.{name} must be above 0, not {values[name]:g}")
    steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 3)
    if steps < 1 and steps != -1:
        raise UserError(f"{where}.max_steps must be 1 or more, or -1 for whole epochs, not {steps}")
    if steps == -1 and not epochs > 0:
        raise UserError(f"{where}.num_train_epochs must be above 0, not {epochs:g}")


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


def _check_reports(told_to: str | list[str] | None, where: str) -> None:
    """Ask for the packages that `report_to` names.

    Raises:
        UserError: there is no such one, or it is not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in [told_to] if isinstance(told_to, str) else told_to or []:
        if name in ("all", "none"):
            continue
        with_place(where, lookup, "choice", name, INTEGRATION_TO_CALLBACK)
        package = {"azure_ml": "azureml", "flyte": "flytekit"}.get(name, name)
        if find_spec(package) is None:
            raise UserError(
                f"{where}: {name} is not installed, which .venv/bin/pip install {package} mends"
            )
