"""How does a Q-Former's first stage begin, and how does the stage after it take what was learnt?

The first stage has no language model: a frozen encoder, a new Q-Former (or BERT's weights), its
three heads and its own words. The stage after it joins the recipe's parts as every first stage of a
language model does, then takes queries and blocks; the linear layer to the language model is new,
the text's weights and the heads stay behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel

from connectors import resolve_connector_config
from connectors.chain import ConnectorChain
from connectors.qformer import QFormerConnector
from connectors.qformer_keys import start_from_bert
from data_recipes.captions import CaptionDataset
from data_recipes.dataset import OnError
from data_recipes.mixture import Source
from train.objectives import QFormerStage1, qformer_of
from train.process import say
from train.recipe import Recipe, StageRecipe
from vlm.caption_tokenizer import count_caption_tokenizer, load_caption_tokenizer
from vlm.encoders import load_vision_encoder
from vlm.errors import UserError
from vlm.image_processing import VlmImageProcessor
from vlm.image_text_model import ImageTextConfig, ImageTextModel
from vlm.image_text_processing import ImageTextProcessor
from vlm.loading import load_weights

MOST_CAPTIONS = 200_000  # that are read for their words


def caption_dataset(
    recipe: Recipe, stage: StageRecipe, sources: Sequence[Source], on_error: OnError
) -> CaptionDataset:
    """Return the pairs of some sources; whoever builds the processor puts it there."""
    longest = _split_features(qformer_of(recipe.model.connector))[0]["max_num_positions"]
    return CaptionDataset(
        sources,
        None,
        seed=recipe.seed,
        on_error=on_error,
        max_length=min(longest, stage.max_length or longest),
    )


def build_first_stage(
    recipe: Recipe, aim: QFormerStage1, dataset: CaptionDataset, source: Path | None
) -> tuple[ImageTextModel, ImageTextProcessor]:
    """Return (model, processor) to train, on the CPU.

    Args:
        recipe: names encoder and connector.
        aim: the objective.
        dataset: its captions' words are counted where no tokenizer is named.
        source: a checkpoint of this stage, or the folder of one like it; None: begin anew.

    Raises:
        UserError: a part cannot be found or does not fit.
    """
    dtype = recipe.model.dtype
    if source is not None:
        model = load_weights(ImageTextModel, source, dtype)
        return model, ImageTextProcessor.from_pretrained(source)
    assert recipe.model.vision_encoder is not None, "checked on reading"
    encoder = load_vision_encoder(recipe.model.vision_encoder, getattr(torch, dtype))
    qformer, features = _split_features(qformer_of(recipe.model.connector))
    tokenizer = _tokenizer(qformer, dataset)
    config = ImageTextConfig(
        vision_config=dict(encoder.config),
        connector_config=qformer,
        features=features,
        vocab_size=qformer["vocab_size"] if qformer["instruction"] else len(tokenizer),
        shared_dim=aim.shared_dim,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ImageTextModel.from_encoder(encoder, config)
    if aim.bert is not None:
        new = start_from_bert(model.connector.qformer, _bert_weights(aim.bert))
        say(f"{aim.bert} gives the Q-Former's weights, except {len(new)} that BERT has not")
    images = VlmImageProcessor(
        view_size=encoder.image_size,
        view_token_grid=(1, qformer["num_queries"]),
        tiling=_one_view(recipe.model.tiling),
        image_mean=encoder.image_mean,
        image_std=encoder.image_std,
    )
    return model, ImageTextProcessor(images, tokenizer)


def take_qformer(model: Any, folder: Path) -> None:
    """Give a model's connector the queries and blocks that a first stage learnt.

    Raises:
        UserError: the first stage's Q-Former has other sizes than the connector.
    """
    learnt = load_weights(ImageTextModel, folder).connector.qformer.state_dict()
    qformer = _connector(model.model.connector).qformer
    for name, own in qformer.state_dict().items():
        if name not in learnt or learnt[name].shape != own.shape:
            found = tuple(learnt[name].shape) if name in learnt else "no such weight"
            raise UserError(
                f"{folder} holds a Q-Former that does not fit the recipe's connector: for {name!r} "
                f"it has {found}, needed is {tuple(own.shape)}; take the connector of its "
                "recipe.yaml, or train it anew in another output_dir"
            )
    qformer.load_state_dict({name: learnt[name] for name in qformer.state_dict()})
    say(f"connector: queries and blocks from {folder}, a new linear layer to the language model")


def _connector(connector: nn.Module) -> QFormerConnector:
    """Return the Q-Former among the parts of a connector."""
    parts = connector.parts if isinstance(connector, ConnectorChain) else [connector]
    (found,) = [part for part in parts if isinstance(part, QFormerConnector)]
    return found


def _split_features(entry: dict[str, Any]) -> tuple[dict[str, Any], list[int] | None]:
    """Return the Q-Former's own fields, defaults written out, and the maps that it reads."""
    values = dict(entry)
    features = values.pop("features", None)
    config = resolve_connector_config(values)
    assert isinstance(config, dict)
    return config, None if features is None else list(features)


def _tokenizer(qformer: dict[str, Any], dataset: CaptionDataset) -> Any:
    """Return the Q-Former's tokenizer: the one named, or one of the captions' words."""
    name, most = qformer["tokenizer"], qformer["vocab_size"]
    if name is None:
        tokenizer = count_caption_tokenizer(dataset.texts(MOST_CAPTIONS), most)
        say(f"the connector names no tokenizer: the captions' own words, {len(tokenizer)} tokens")
        return tokenizer
    tokenizer = load_caption_tokenizer(name)
    if len(tokenizer) > most:
        raise UserError(
            f"the Q-Former's tokenizer {name} has {len(tokenizer)} tokens, but the connector knows "
            f"{most}; set its vocab_size, or another tokenizer"
        )
    return tokenizer


def _bert_weights(source: str) -> dict[str, Any]:
    """Return BERT's weights under their published names.

    Raises:
        UserError: they cannot be loaded.
    """
    try:
        return AutoModel.from_pretrained(source).state_dict()
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"objective.bert {source} cannot be loaded: {reason}") from error


def _one_view(tiling: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's tiling if it makes one view of a picture, else one stretched view."""
    return tiling if tiling["type"] in ("resize", "pad") else {"type": "resize"}
