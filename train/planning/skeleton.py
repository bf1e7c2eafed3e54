"""What does a recipe's model look like without a network, a weight, or memory?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from connectors import resolve_connector_config, view_token_grid
from train.freeze import PARTS, owner
from train.planning.architectures import text_config
from train.recipe import ModelRecipe
from vlm.configuration import VlmConfig
from vlm.encoders import VisionEncoder, build_vision_encoder
from vlm.encoders.presets import ENCODERS, expand_preset
from vlm.errors import UserError
from vlm.image_processing import VlmImageProcessor
from vlm.long_context import scale_positions
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor
from vlm.tiling import build_tiling, tiling_config


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and what is known of it.

    Attributes:
        model: shapes without values.
        processor: makes rows of conversations; None where the tokenizer is not on this machine.
        parameters: part -> how many are built.
        published: part -> how many the part's checkpoint has, layers that nobody reads included.
    """

    model: VlmForConditionalGeneration
    processor: VlmProcessor | None
    parameters: dict[str, int]
    published: dict[str, int]


def build_skeleton(recipe: ModelRecipe) -> Skeleton:
    """Build a recipe's model on the meta device.

    Args:
        recipe: components, or a checkpoint of ours.

    Raises:
        UserError: an architecture is neither in a folder here nor known by name.
    """
    source = recipe.checkpoint
    config, processor = _components(recipe) if source is None else _checkpoint(source)
    if recipe.video is not None:
        config.video = dict(recipe.video)
        if processor is not None:
            processor.image_processor.set_video(recipe.video)
    model = hollow_model(config)
    if recipe.rope_factor is not None:
        scale_positions(model.model.language_model, recipe.rope_factor)
    parameters = count_parts(model)
    whole = _whole_encoder(model.model.vision_tower.config, parameters["vision_tower"])
    return Skeleton(model, processor, parameters, {**parameters, "vision_tower": whole})


def hollow_model(config: VlmConfig) -> VlmForConditionalGeneration:
    """Return a model on the meta device."""
    with torch.device("meta"):
        model = VlmForConditionalGeneration(config)
    model.tie_weights()
    return model


def count_parts(model: nn.Module, trained_only: bool = False) -> dict[str, int]:
    """Return part -> number of parameters, or of those that train; tied ones count once."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            sizes[owner(name)] += parameter.numel()
    return sizes


def largest_layer(model: Any) -> int:
    """Return the parameters of the largest module that repeats in the language model."""
    lists = [m for m in model.model.language_model.modules() if isinstance(m, nn.ModuleList)]
    layers = [layer for modules in lists for layer in modules]
    return max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)


def _whole_encoder(vision: Mapping[str, Any], built: int) -> int:
    """Return the encoder's parameters with the layers above the highest one asked for."""
    if vision["type"] == "several" or vision.get("layer", "last") == "last":
        return built
    with torch.device("meta"):
        whole = build_vision_encoder({**vision, "layer": "last", "grids": None, "dims": None})
    return max(built, sum(p.numel() for p in whole.parameters()))


def _checkpoint(source: str) -> tuple[VlmConfig, VlmProcessor | None]:
    """Return config and processor of a checkpoint of ours."""
    try:
        config = VlmConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.checkpoint: {source} has no config.json, and nothing is fetched here; give a "
            "folder that `vlm train` wrote"
        ) from error
    try:
        return config, VlmProcessor.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return config, None


def _components(recipe: ModelRecipe) -> tuple[VlmConfig, VlmProcessor | None]:
    """Return config and processor of parts that are joined for the first time."""
    assert recipe.vision_encoder and recipe.connector and recipe.language_model, "checked"
    text = text_config(recipe.language_model)
    with torch.device("meta"):
        tower = build_vision_encoder(known_encoder(recipe.vision_encoder))
        head = _head(recipe.language_model, text)
    processor = _processor(recipe, tower)
    if processor is not None:
        text.vocab_size = max(len(processor.tokenizer), text.vocab_size)
    config = VlmConfig(
        vision_config=dict(tower.config),
        connector_config=resolve_connector_config(recipe.connector),
        text_config=text,
        tiling=tiling_config(build_tiling(recipe.tiling)),
        image_token_id=1,  # any but 0, which stands for text
        lm_head_bias=head.bias is not None,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return config, processor


def _head(source: str, text: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_config(text).get_output_embeddings()
    except ValueError as error:
        raise UserError(
            f"model.language_model: {source} is a {text.model_type!r} model, no language model"
        ) from error


def _processor(recipe: ModelRecipe, tower: VisionEncoder) -> VlmProcessor | None:
    """Return the processor as `vlm.loading.assemble` makes it, if the tokenizer is here."""
    assert recipe.connector and recipe.language_model
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.language_model, local_files_only=True)
    except (OSError, ValueError):
        return None
    image_processor = VlmImageProcessor(
        view_size=tower.image_size,
        view_token_grid=view_token_grid(recipe.connector, tower.grids),
        tiling=tiling_config(build_tiling(recipe.tiling)),
        image_mean=tower.image_mean,
        image_std=tower.image_std,
    )
    # Without what reads instructions: no row is longer for them.
    return VlmProcessor.prepare(tokenizer, image_processor, recipe.chat_template)


def known_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an encoder's config with what a preset of the same source knows, for lack of a hub."""
    values = dict(expand_preset(config))
    if values.get("type") == "several":
        return {**values, "encoders": [known_encoder(part) for part in values["encoders"]]}
    source = values.get("source")
    if source is None or Path(source).is_dir():
        return values
    for preset in ENCODERS.values():
        if (preset.type, preset.source) == (values.get("type"), source):
            known = preset.config()
            if "image_size" not in values and "architecture" in known:
                del known["image_size"]  # the architecture says it
            return {**known, "layer": "last", **values}
    return values
