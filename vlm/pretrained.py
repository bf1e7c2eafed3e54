"""What does transformers ask of both classes of the model?"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlm.configuration import VlmConfig
from vlm.encoders.base import restore_buffers
from vlm.recompute import checkpoint_options


class VlmPreTrainedModel(PreTrainedModel):
    """What transformers asks of both classes below."""

    config_class = VlmConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say that modules may be initialised as transformers' own are.

        While loading, custom code has every module skipped whose own tensors came from the file or
        that has none. A language model that fills its layers' buffers itself (Falcon-H1's
        multipliers) would keep what lies in memory.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as transformers does, and compute again what checkpoints do not hold."""
        super()._init_weights(module)
        restore_buffers(module)

    def activation_checkpointing_enable(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Let layers be computed again in the backward pass; see `vlm.recompute`."""
        options = checkpoint_options(activation_checkpointing_kwargs)
        super().activation_checkpointing_enable(options, **kwargs)
        if options is None or options.get("use_reentrant") is False:
            # Only reentrant checkpoints need inputs with gradients; to others they are a hook that
            # lets gradients be computed of what is frozen.
            self.disable_input_require_grads()
