"""How does a language model read further than it was trained to? By RoPE linear scaling.

Positions are divided by a factor, so that factor times as many lie in the range that was trained
(position interpolation, Chen et al. 2023), as LLaVA-NeXT-Video does for more frames. The model
needs some training at it. At 144 tokens a frame 4096 positions hold 28 frames, and 8192 hold 56.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlm.errors import UserError


def context_length(text_config: Any) -> int | None:
    """Return the longest sequence a language model knows; None where it has no limit.

    A hybrid that tells no positions apart may still name one (Jamba does): it is taken at its word.
    """
    if hasattr(text_config, "max_position_embeddings"):
        return text_config.max_position_embeddings
    return None


def scale_positions(language_model: PreTrainedModel, factor: float) -> None:
    """Divide a language model's positions by `factor`; it then knows `factor` times as many.

    Args:
        language_model: any whose positions are rotary; config and rotary modules are changed, and
            what is saved of it has the new config.
        factor: 2.0 doubles the context.

    Raises:
        UserError: its positions are not plain rotary ones, or the factor is below 1.
    """
    if not 1 <= factor < float("inf"):
        raise UserError(f"rope_factor must be 1 or more, not {factor:g}")
    config: Any = language_model.config
    values = config.to_dict()
    rope, most = values.get("rope_parameters"), values.get("max_position_embeddings")
    if not isinstance(rope, dict) or rope.get("rope_type") != "default" or most is None:
        raise UserError(
            f"rope_factor is for language models with plain rotary positions, but this "
            f"{config.model_type!r} has {rope or 'none'}"
        )
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = int(most * factor)
    for parent in list(language_model.modules()):
        for name, module in list(parent.named_children()):
            if "inv_freq" in dict(module.named_buffers(recurse=False)):
                setattr(parent, name, _anew(module, config))


def _anew(rotary: nn.Module, config: Any) -> nn.Module:
    """Return a rotary module that reads the config again."""
    kind: Any = type(rotary)
    return kind(config=config).to(next(rotary.buffers()).device)
