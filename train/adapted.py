"""How does a stage begin whose language model stays as it is, quantised or with an adapter?

Its checkpoints hold what it trains and name the folder of the rest, its base (vlm/on_base.py): the
stage before, or the recipe's checkpoint; where neither is a folder with just these weights, they
are written once, as `base`, into the stage's own folder.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.config import config_from_mapping
from train.engine import cuts_weights
from train.freeze import PARTS
from train.objectives import NextToken
from vlm.adapters import AdapterConfig, check_beside
from vlm.errors import UserError

if TYPE_CHECKING:
    from train.recipe import ModelRecipe, Recipe, StageRecipe

BASE = "base"  # folder in a stage's folder


def parse_adapter(value: Any, where: str) -> AdapterConfig | None:
    """Return the adapter that a stage's mapping describes, checked; None: none.

    Raises:
        UserError: unknown field, or a value that cannot be.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: adapter must be a mapping such as {{type: lora, rank: 128}}")
    try:
        return config_from_mapping(AdapterConfig, value, "adapter")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_adapters(model: "ModelRecipe", stages: Sequence["StageRecipe"], where: str) -> None:
    """Refuse adapters and quantised weights that their stage, or the connector, cannot have.

    Raises:
        UserError: the sentence says which stage and why.
    """
    for stage in stages:
        place = f"{where}: stages.{stage.name}"
        trains = "language_model" in stage.ever_trained
        if stage.adapter is not None and not trains:
            raise UserError(
                f"{place}: the adapter needs its learning rate: name language_model in trainable"
            )
        if model.quantization is not None and trains and stage.adapter is None:
            raise UserError(
                f"{place}: model.quantization freezes the language model, so it cannot train in "
                "full; give the stage an adapter, such as {type: lora}"
            )
        cuts = model.quantization and cuts_weights(stage.training, f"{place}.training")
        if cuts:
            raise UserError(
                f"{place}: training.{cuts} would cut quantised weights to pieces; take it out "
                "(several GPUs: train/launch/torchrun.sh, or deepspeed: zero2), or leave "
                "model.quantization out"
            )
        if stage.adapter is not None and stage.adapter.dora and model.quantization == "int8":
            raise UserError(
                f"{place}: dora cannot stand beside int8 weights, whose scales PEFT loses on a "
                "CPU; choose nf4, or set adapter.dora to false"
            )
        if stage.adapter is not None and model.connector is not None:
            try:
                check_beside(model.connector, stage.adapter)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error


def require_packages(recipe: "Recipe", stage: "StageRecipe") -> None:
    """Ask for the libraries of a stage before an earlier one spends a day.

    Raises:
        ModuleNotFoundError: the command line says which extra brings it.
    """
    if stage.adapter is not None:
        import peft  # noqa: F401
    if recipe.model.quantization is not None:
        import bitsandbytes  # noqa: F401 # pyright: ignore[reportMissingImports]


def keeps_base(recipe: "Recipe", stage: "StageRecipe") -> bool:
    """Return whether a stage's checkpoints hold only what it trains."""
    quantized = recipe.model.quantization is not None
    return stage.adapter is not None or (quantized and isinstance(stage.aim, NextToken))


def plain_folder(source: str | Path) -> Path | None:
    """Return a source as a folder, if it is one that holds all of its weights itself."""
    from vlm.on_base import stands_on_base

    return Path(source) if Path(source).is_dir() and not stands_on_base(source) else None


def put_on_base(
    recipe: "Recipe", stage: "StageRecipe", source: Path | None, model: Any, processor: Any
) -> None:
    """Quantise the language model and give it an adapter, as the stage wants it.

    Args:
        recipe: says how to quantise.
        stage: says which adapter, and what else it trains.
        source: the folder that the model was loaded from as it is, if it is such a folder.
        model: on the CPU, its weights those of the base.
        processor: written with the base, so that this is a checkpoint too.

    Raises:
        UserError: the model cannot be quantised, or cannot have such an adapter.
    """
    import torch

    from train.process import is_main_process
    from vlm.adapters import add_adapter, is_adapter
    from vlm.on_base import Base, fingerprint
    from vlm.quantization import quantize

    folder = source or Path(recipe.output_dir) / stage.name / BASE
    if source is None and is_main_process():
        write_base(model, processor, folder)
    mixed = "bfloat16" if stage.training.get("bf16") else recipe.model.dtype
    compute_dtype = "float16" if stage.training.get("fp16") else mixed
    base = Base(
        folder=str(folder.resolve()),
        fingerprint=fingerprint(folder) if is_main_process() else "",
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        compute_dtype=compute_dtype,
        trained=trained_beside(stage),
    )
    if base.quantization is not None:
        quantize(model, base.quantization, getattr(torch, compute_dtype))
    if stage.adapter is not None:
        add_adapter(model, stage.adapter)
    for name, parameter in model.named_parameters():
        if base.holds(name) and not is_adapter(name):
            parameter.data = parameter.data.float()  # what learns is kept exactly
    model.on_base = base


def trained_beside(stage: "StageRecipe") -> list[str]:
    """Return the prefixes of parameters that a stage trains in full beside the language model."""
    parts = [part for part in stage.ever_trained if part != "language_model"]
    return [prefix for part in parts for prefix in PARTS[part]]


def write_base(model: Any, processor: Any, folder: Path) -> None:
    """Write a model that exists in no folder as it is; a kill leaves all of it or nothing."""
    if folder.exists():
        return  # of a start that was cut short before its first checkpoint
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(folder)


def describe_base(model: Any) -> str:
    """Return a line about what stands on what."""
    from vlm.adapters import adapted_linears
    from vlm.quantization import quantized_linears

    told = []
    if model.on_base.quantization is not None:
        count = len(quantized_linears(model))
        told.append(f"{count} linear layers in {model.on_base.quantization}")
    if model._hf_peft_config_loaded:
        told.append(f"an adapter beside {len(adapted_linears(model))} linear layers")
    return f"language_model: {', '.join(told)}; frozen weights stay in {model.on_base.folder}"
