"""Which numbers rebuild a vision-language model's architecture, without any weights?"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class VlmConfig(PreTrainedConfig):
    """The `config.json` of a model: one dict per part, as recipes write them, fully resolved.

    Attributes:
        vision_config: resolved encoder config; `build_vision_encoder` rebuilds it offline.
        connector_config: `{"type": ..., fields}`, or a list of them, for `build_connector`.
        text_config: the language model's own config class.
        tiling: `{"type": ..., fields}` for `build_tiling`.
        video: fields of `VideoConfig`; None: the defaults.
        image_token_id: id of the tokenizer's image token, whose rows image features replace.
        lm_head_bias: whether the language model's head adds a bias (Phi does).
    """

    model_type = "vlm"
    sub_configs_defaults = {  # noqa: RUF012 - the name and the kind are transformers'
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    vision_config: dict[str, Any] | None = None
    connector_config: dict[str, Any] | list[dict[str, Any]] | None = None
    text_config: dict | PreTrainedConfig | None = None
    tiling: dict[str, Any] | None = None
    video: dict[str, Any] | None = None
    image_token_id: int | None = None
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
