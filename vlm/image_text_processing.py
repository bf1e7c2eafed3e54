"""How do a picture and its caption become a Q-Former's first-stage inputs?

Shapes: B pairs, L text tokens, S view size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from vlm.errors import UserError
from vlm.image_processing import VlmImageProcessor


class ImageTextProcessor(ProcessorMixin):
    """Image processor and the Q-Former's own tokenizer; saved and loaded with the model."""

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        """Join the parts.

        Args:
            image_processor: one whose tiling makes one view of each picture.
            tokenizer: see `vlm.caption_tokenizer`.
            **kwargs: what transformers stores beside them.
        """
        super().__init__(image_processor, tokenizer)

    def encode(self, picture: Image.Image, caption: str, max_length: int) -> dict[str, Tensor]:
        """Return pixel_values (1, 3, S, S) and input_ids (L,), `[CLS]` and `[SEP]` included.

        Raises:
            UserError: the caption has more than `max_length` tokens; it is never cut.
        """
        ids = self._ids(caption)
        if len(ids) > max_length:
            raise UserError(
                f"the caption takes {len(ids)} tokens, more than {max_length}; raise the stage's "
                "max_length, or the connector's max_num_positions"
            )
        pixels = self.image_processor([picture])["pixel_values"]
        return {"pixel_values": pixels, "input_ids": torch.tensor(ids)}

    def num_tokens(self, caption: str) -> int:
        """Return L of a caption."""
        return len(self._ids(caption))

    def _ids(self, caption: str) -> list[int]:
        return self.tokenizer(caption, return_attention_mask=False, verbose=False)["input_ids"]

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return pixel_values (B, 3, S, S), input_ids (B, L) and attention_mask (B, L)."""
        rows = [row["input_ids"] for row in encoded]
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "pixel_values": torch.cat([row["pixel_values"] for row in encoded]),
            "input_ids": ids,
            "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None],
        }
