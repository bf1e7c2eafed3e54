"""Where do a stage's weights come from? Its own checkpoint, the stage before, or the components."""

from pathlib import Path
from typing import Any

from train.adapted import keeps_base, plain_folder, put_on_base
from train.objectives import QFormerStage1
from train.qformer_stage1 import take_qformer
from train.recipe import Recipe, StageRecipe
from vlm.errors import UserError


def build_model(
    recipe: Recipe, stage: StageRecipe, previous: Path | None, checkpoint: Path | None
) -> tuple[Any, Any]:
    """Return (model, processor) to train, on the CPU; the Trainer moves them.

    Args:
        recipe: its `model` is what the first stage starts from.
        stage: decides the chat template.
        previous: folder of the stage before, None for the first; of a Q-Former's first stage, the
            connector takes what it learnt.
        checkpoint: the stage's own newest checkpoint, None for a fresh start.

    Raises:
        UserError: a component cannot be found or does not fit; the sentence says which.
    """
    from vlm.chat_templates import CHAT_TEMPLATES, load
    from vlm.loading import load_model

    source = checkpoint or previous or recipe.model.checkpoint
    after_first_stage = previous is not None and _is_first_stage(recipe, previous)
    if source is None or (checkpoint is None and after_first_stage):
        model, processor = _assemble(recipe)
        if previous is not None:
            take_qformer(model, previous)
        plain = None
    else:
        # What a stage learns has the type it learns in, the frozen weights below it the recipe's.
        on_base = checkpoint is not None and keeps_base(recipe, stage)
        dtype = None if on_base else recipe.model.dtype
        model, processor = load_model(source, dtype, "cpu", merged=not on_base)
        if previous is not None or recipe.model.chat_template is not None:
            processor.chat_template = model_template(recipe)
        plain = plain_folder(source)
        if checkpoint is None and previous is None and _look_otherwise(recipe, model, processor):
            plain = None
    check_context(stage, model)
    if checkpoint is None and keeps_base(recipe, stage):
        put_on_base(recipe, stage, plain, model, processor)
    if stage.chat_template is not None:
        vocabulary = processor.tokenizer.get_vocab()
        special = CHAT_TEMPLATES[stage.chat_template].special_tokens
        if missing := [token for token in special if token not in vocabulary]:
            raise UserError(
                f"stages.{stage.name}.chat_template {stage.chat_template!r} needs the token "
                f"{missing[0]!r}, which the model does not have; set it as model.chat_template"
            )
        processor.chat_template = load(stage.chat_template)
    return model, processor


def _assemble(recipe: Recipe) -> tuple[Any, Any]:
    """Join the recipe's components, with a new connector."""
    from vlm.loading import assemble

    parts = recipe.model
    assert parts.vision_encoder and parts.connector and parts.language_model, "checked on reading"
    return assemble(
        parts.vision_encoder,
        parts.connector,
        parts.language_model,
        tiling=parts.tiling,
        chat_template=parts.chat_template,
        dtype=parts.dtype,
        video=parts.video,
        rope_factor=parts.rope_factor,
    )


def _look_otherwise(recipe: Recipe, model: Any, processor: Any) -> bool:
    """Give a checkpoint the recipe's videos and context; return whether that changes it."""
    from vlm.long_context import scale_positions
    from vlm.video_layout import parse_video

    factor, known = recipe.model.rope_factor, model.model.video
    video = known if recipe.model.video is None else parse_video(recipe.model.video)
    if video != known:
        model.model.set_video(video)
        processor.image_processor.set_video(model.config.video)
    if factor is not None:
        scale_positions(model.model.language_model, factor)
    return video != known or factor is not None


def check_context(stage: StageRecipe, model: Any) -> None:
    """Refuse rows that are longer than the language model can tell positions apart.

    Raises:
        UserError: with both lengths, and the factor that would do.
    """
    from vlm.long_context import context_length

    known = context_length(model.config.text_config)
    if stage.max_length is not None and known is not None and stage.max_length > known:
        raise UserError(
            f"stages.{stage.name}.max_length {stage.max_length} is more than the {known} positions "
            f"that the language model knows; lower it, or set model.rope_factor to "
            f"{-(-stage.max_length // known)} (rotary positions, divided by it)"
        )


def _is_first_stage(recipe: Recipe, folder: Path) -> bool:
    """Return whether a stage's folder holds a Q-Former without a language model."""
    return isinstance(recipe.stage(folder.name).aim, QFormerStage1)


def model_template(recipe: Recipe) -> Any:
    """Return the template of stages that name none, also where the stage before named one."""
    from transformers import AutoTokenizer

    from vlm.chat_templates import load
    from vlm.loading import VlmProcessor

    if recipe.model.chat_template is not None:
        return load(recipe.model.chat_template)
    if recipe.model.checkpoint is not None:
        return VlmProcessor.from_pretrained(recipe.model.checkpoint).chat_template
    return AutoTokenizer.from_pretrained(recipe.model.language_model).chat_template
