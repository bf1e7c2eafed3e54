"""How do the tokens of an image share one position, with a cache and in packed rows?

Shapes: B batch, L sequence of this call, E language-model width.

As CogVLM has it (`connectors/fusion.py`, `saved_positions`). Position ids come in as if nothing
were shared, whoever counted them, and what the images have saved is taken off; the cache holds what
those of earlier calls have.

Surprise: transformers reads packed documents off position ids, where ids that do not go on by one
begin another. Shared ones would be taken for that where there is no mask, so there always is one.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import is_flash_attention_requested

from connectors.fusion import FusionContext
from vlm.errors import UserError
from vlm.fusion_cache import FusionLayer


def shared_positions(
    language_model: PreTrainedModel,
    context: FusionContext,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    carried: FusionLayer | None,
) -> Tensor:
    """Return position ids (B, L) in which the inner tokens of an image share one.

    Args:
        language_model: the bare one.
        context: of this call.
        position_ids: (B, L) or (1, L); None: they go on from the cache.
        past_key_values: the cache.
        carried: what the connectors left in it.

    Raises:
        UserError: the language model runs flash attention, which drops a mask that hides nothing.
    """
    config = language_model.config
    if is_flash_attention_requested(config):
        raise UserError(
            "connector 'visual_expert' with shared_positions cannot run on "
            f"{config._attn_implementation}, which reads documents off positions; load the model "
            "with attn_implementation sdpa, or set shared_positions to false"
        )
    saved = context.saved_positions
    if position_ids is None:
        begin = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(begin, begin + saved.shape[1], device=saved.device)[None]
    if carried is not None:
        saved = saved + carried.saved.to(saved.device)[:, None]
    return position_ids - saved


def explicit_mask(
    language_model: PreTrainedModel,
    inputs_embeds: Tensor,
    packed_positions: Tensor | None,
    past_key_values: Cache | None,
) -> Any:
    """Return what stands for no attention mask, so that positions are not read as documents.

    Args:
        language_model: the bare one.
        inputs_embeds: (B, L, E).
        packed_positions: (B, L) as they were before any were shared, where documents are packed.
        past_key_values: the cache.
    """
    if packed_positions is not None:
        return create_masks_for_generate(
            language_model.config, inputs_embeds, None, None, packed_positions
        )
    begin = 0 if past_key_values is None else past_key_values.get_seq_length()
    batch, length = inputs_embeds.shape[:2]
    return torch.ones(batch, begin + length, dtype=torch.long, device=inputs_embeds.device)
