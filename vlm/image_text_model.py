"""How well do a picture and a text fit? A frozen encoder and a Q-Former as its first stage has it.

Shapes: B pairs, S view size, K features of a view, D encoder width, L text tokens, A pairs of all
processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from connectors.base import join_channels
from connectors.config import config_from_mapping
from connectors.float32 import float32_modules
from connectors.qformer import QFormerConfig
from connectors.qformer_losses import Pairs, Stage1Output
from connectors.qformer_stage1 import QFormerStage1, alone
from connectors.views import TextInput
from vlm.encoders import VisionEncoder, build_vision_encoder
from vlm.encoders.base import restore_buffers
from vlm.errors import UserError


class ImageTextConfig(PreTrainedConfig):
    """The `config.json` of a model.

    Attributes:
        vision_config: resolved encoder config; `build_vision_encoder` rebuilds it offline.
        connector_config: `{"type": "qformer", fields}`, as the connector that it becomes.
        features: which of the encoder's feature maps it reads, counted from 0; None: all.
        vocab_size: tokens of the Q-Former's text.
        shared_dim: width of the space in which pictures and texts are compared.
        bos_token_id: `[DEC]`, which begins a caption to be written.
        pad_token_id: the tokenizer's.
    """

    model_type = "vlm_image_text"

    vision_config: dict[str, Any] | None = None
    connector_config: dict[str, Any] | None = None
    features: list[int] | None = None
    vocab_size: int = 30523
    shared_dim: int = 256
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True


class ImageTextModel(PreTrainedModel):
    """A vision tower that never trains, and the Q-Former with the heads of its first stage."""

    config: ImageTextConfig
    config_class = ImageTextConfig
    _tied_weights_keys = {  # noqa: RUF012 - transformers' form
        "connector.caption_head.decoder.weight": "connector.qformer.word_embeddings.weight"
    }

    def __init__(self, config: ImageTextConfig) -> None:
        """Build the architecture of `config` with random weights."""
        super().__init__(config)
        assert config.vision_config and config.connector_config, config
        self.vision_tower = build_vision_encoder(config.vision_config)
        self.connector = new_qformer(self.vision_tower, config)
        self._keep_in_fp32_modules_strict = float32_modules(self.connector, "connector")
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say that modules may be initialised as transformers' own; see `VlmPreTrainedModel`."""
        return False

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Initialise as transformers does, and compute again what checkpoints do not hold."""
        super()._init_weights(module)
        restore_buffers(module)

    @classmethod
    def from_encoder(cls, encoder: VisionEncoder, config: ImageTextConfig) -> "ImageTextModel":
        """Put a new Q-Former beside a loaded encoder, which is used, not copied."""
        with torch.device("meta"):
            model = cls(config)
        model.vision_tower = encoder
        model.connector = new_qformer(encoder, config)
        return model

    def train(self, mode: bool = True) -> "ImageTextModel":
        """Set the mode of the Q-Former; the vision tower stays in eval mode."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    @torch.no_grad()
    def encode_pictures(self, pixel_values: Tensor) -> Tensor:
        """Return the features (B, K, D) of pictures (B, 3, S, S)."""
        chosen = _chosen(self.vision_tower, self.config)
        maps, dims = self.vision_tower(pixel_values), self.vision_tower.dims
        joined = join_channels([maps[i] for i in chosen], [dims[i] for i in chosen])
        return joined.flatten(1, 2).float()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pairs: Pairs,
        gather: Callable[[Tensor], Tensor] = alone,
    ) -> Stage1Output:
        """Return losses and figures of B pairs; see `QFormerStage1.forward`.

        Args:
            pixel_values: (B, 3, S, S).
            input_ids: (B, L), which begin with `[CLS]`.
            attention_mask: (B, L), False where padding stands.
            pairs: which of them share a picture or a caption, and what decides the draw.
            gather: makes (A, ...), with gradients, of (B, ...).
        """
        assert self.config.bos_token_id is not None, "set by from_encoder"
        features = self.encode_pictures(pixel_values)
        text = TextInput(input_ids, attention_mask.bool())
        return self.connector(features, text, self.config.bos_token_id, pairs, gather)


def new_qformer(encoder: VisionEncoder, config: ImageTextConfig) -> QFormerStage1:
    """Return a Q-Former with its first stage's heads, with new weights.

    Raises:
        UserError: `features` names a map that the encoder does not give.
    """
    assert config.connector_config is not None, config
    fields = {name: value for name, value in config.connector_config.items() if name != "type"}
    connector = config_from_mapping(QFormerConfig, fields, "connector 'qformer'")
    size = connector.size(sum(encoder.dims[i] for i in _chosen(encoder, config)))
    size = replace(size, vocab_size=config.vocab_size, text_output=True)
    return QFormerStage1(size, config.shared_dim)


def _chosen(encoder: VisionEncoder, config: ImageTextConfig) -> Sequence[int]:
    """Return which feature maps are read, counted from 0."""
    count = len(encoder.dims)
    if config.features is None:
        return range(count)
    if not all(0 <= i < count for i in config.features):
        raise UserError(
            f"connector 'qformer': features {config.features} counts from 0, but the vision "
            f"encoder gives {count} feature maps"
        )
    return config.features
