"""Do encoder, connector and language model fit? Built without weights, so that it is known early.

Shapes: H W feature grid, D encoder width, N tokens per view.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from connectors import acts_inside, build_connector, view_token_grid
from vlm.configuration import VlmConfig
from vlm.encoders import VisionEncoder, build_vision_encoder
from vlm.errors import UserError
from vlm.hosts import host_shape
from vlm.loading import check_checkpoint
from vlm.modeling import VlmForConditionalGeneration


@dataclass(frozen=True)
class Fit:
    """What is known of a variant before it is trained.

    Attributes:
        grids: (H, W) of each feature map.
        view_tokens: N, tokens that the connector makes of one view.
        parameters: of "encoder", "connector" and "language model".
    """

    grids: tuple[tuple[int, int], ...]
    view_tokens: int
    parameters: Mapping[str, int]


class Parts:
    """Builds variants on the meta device; a part that several share is built once."""

    def __init__(self) -> None:
        self._encoders: dict[str, VisionEncoder] = {}
        self._language_models: dict[str, PreTrainedModel] = {}

    def check(self, model: Mapping[str, Any]) -> Fit:
        """Return a variant's sizes.

        Args:
            model: `model` of its recipe.

        Raises:
            UserError: a part cannot be found, or they do not fit.
        """
        if model["checkpoint"] is not None:
            return fit_of_checkpoint(model["checkpoint"])
        encoder = self._encoder(model["vision_encoder"])
        language_model = self._language_model(model["language_model"])
        choice = model["connector"]
        rows, columns = view_token_grid(choice, encoder.grids)
        bare: Any = language_model.base_model
        host = host_shape(bare) if acts_inside(choice) else None
        with torch.device("meta"):
            connector = build_connector(choice, encoder.dims, bare.config.hidden_size, host)
            features = [
                torch.empty(1, *grid, dim)
                for grid, dim in zip(encoder.grids, encoder.dims, strict=True)
            ]
        tokens = connector.eval().project(features)
        if tuple(tokens.shape) != (1, rows * columns, bare.config.hidden_size):
            raise UserError(
                f"connector {choice!r} makes tokens of shape {tuple(tokens.shape)} where "
                f"{(1, rows * columns, bare.config.hidden_size)} was expected"
            )
        return Fit(
            grids=encoder.grids,
            view_tokens=rows * columns,
            parameters={
                "encoder": count(encoder),
                "connector": count(connector),
                "language model": count(language_model),
            },
        )

    def _encoder(self, config: Mapping[str, Any]) -> VisionEncoder:
        key = repr(config)
        if key not in self._encoders:
            with torch.device("meta"):
                self._encoders[key] = build_vision_encoder(config)
        return self._encoders[key]

    def _language_model(self, source: str) -> PreTrainedModel:
        if source not in self._language_models:
            try:
                config = AutoConfig.from_pretrained(source)
                with torch.device("meta"):
                    self._language_models[source] = AutoModelForCausalLM.from_config(config)
            except (OSError, ValueError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"the language model {source} cannot be read: {first}") from error
        return self._language_models[source]


def fit_of_checkpoint(source: str) -> Fit:
    """Return the sizes of a model that variants start from.

    Raises:
        UserError: it is none.
    """
    check_checkpoint(source)
    with torch.device("meta"):
        model = VlmForConditionalGeneration(VlmConfig.from_pretrained(source))
    parts = model.model
    rows, columns = parts.view_token_grid()
    sizes = {"encoder": count(parts.vision_tower), "connector": count(parts.connector)}
    return Fit(
        grids=tuple(parts.vision_tower.grids),
        view_tokens=rows * columns,
        parameters=sizes | {"language model": count(model) - sum(sizes.values())},
    )


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
