"""How does each decoder layer look at a finer picture than its tokens? CogAgent's cross-attention.

Shapes: B batch, L positions, M features of a row's pictures, E language-model width, D encoder
width, I width of the attention, T views, H W feature grid.

Between self-attention and the feed-forward part, hidden states look at 80 x 80 features of a small
encoder, which would be too many as tokens. Image and text positions do alike; there are no
positions but those the features carry, and no gate.

Surprises:
- Heads are as many as the language model's, but narrower: 32 channels each.
- Where there is no picture the reference cannot run; here nothing is added.

Follows `modeling_cogagent.py` (CrossAttention) and `cross_visual.py` of THUDM/cogagent-chat-hf;
section 2.2 of arXiv:2312.08914.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from connectors.cross_attention import MediaAttention, MediaBlock
from connectors.key_table import KeyTable
from connectors.position_tables import resize_table

_STD = 0.02  # of new weights: the reference's `initializer_range`


class HighResolutionBlock(MediaBlock):
    """Hidden states (B, L, E) look at features (B, M, D)."""

    def __init__(
        self, dim: int, media_dim: int, inner_dim: int, num_heads: int, eps: float = 1e-5
    ) -> None:
        """Build the layers.

        Args:
            dim: E.
            media_dim: D.
            inner_dim: I, which `num_heads` divides.
            num_heads: heads of the language model.
            eps: of the norm, as in the language model.
        """
        norm = nn.RMSNorm(dim, eps=eps)
        super().__init__(MediaAttention(norm, dim, media_dim, inner_dim, num_heads))
        for linear in (self.attention.query, self.attention.key_value, self.attention.output):
            nn.init.normal_(linear.weight, std=_STD)

    def forward(
        self, x: Tensor, media: Tensor, mask: Tensor | None, key_value: Tensor | None = None
    ) -> Tensor:
        """Return hidden states (B, L, E); the arguments are those of `MediaAttention`."""
        return x + self.attention(x, media, mask, key_value)


class LearnedPositions(nn.Module):
    """A learned table of a square grid, begun as zeros, is added to the features."""

    def __init__(self, side: int, dim: int) -> None:
        """Build the table (side * side, D)."""
        super().__init__()
        self.table = nn.Parameter(torch.zeros(side * side, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (T, H, W, D) to (T, H * W, D); another grid resizes the table."""
        table = resize_table(self.table, *features.shape[1:3])
        return features.flatten(1, 2) + table


def high_resolution_keys(layers: Sequence[int], ours: str, positions: str) -> dict[str, KeyTable]:
    """Return {format: {published key: our key}} of CogAgent's checkpoints.

    Args:
        layers: the decoder layers with a block, in order, counted from 0.
        ours: name of our list of blocks and a dot, such as "blocks.".
        positions: name of our `LearnedPositions` and a dot, such as "positions.".
    """
    parts = {
        "cross_attn.query.weight": "attention.query.weight",
        "cross_attn.key_value.weight": "attention.key_value.weight",
        "cross_attn.dense.weight": "attention.output.weight",
        "post_cross_attention_layernorm.weight": "attention.norm.weight",
    }
    table = "model.cross_vision.pos_embed"
    keys, roots = {table: f"{positions}table"}, [table]
    for number, layer in enumerate(layers):
        place = f"model.layers.{layer}."
        keys |= {place + theirs: f"{ours}{number}.{own}" for theirs, own in parts.items()}
        roots += [f"{place}cross_attn", f"{place}post_cross_attention_layernorm"]
    return {"cogagent": KeyTable(keys, roots)}
