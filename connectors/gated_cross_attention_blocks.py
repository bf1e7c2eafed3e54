"""How does text look at pictures in a frozen language model? Flamingo's gated cross-attention.

Shapes: B batch, L positions, M media tokens of a row, E language-model width, D media width, P
channels of a head.

A block stands before a decoder layer: hidden states look at media, then pass through a feed-forward
part; both are added times tanh of a gate. Gates begin at 0, so that the language model begins
unchanged.

Surprises:
- Only the hidden states are normed: media come normed, from a perceiver.
- A position before the first image may look at nothing and gets nothing. With
  `only_attend_immediate_media=False` the reference gives it the mean of all values instead, of
  images still to come: its softmax meets a row that is masked throughout. `unseen="uniform"` does
  as it does.
- The feed-forward part runs on all positions, also those that see nothing.

Follows `open_flamingo/src/helpers.py` (GatedCrossAttentionBlock) of mlfoundations/open_flamingo;
section 3.2 of arXiv:2204.14198.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from connectors.cross_attention import MediaAttention, MediaBlock, Unseen
from connectors.key_table import KeyTable


class GatedCrossAttentionBlock(MediaBlock):
    """Hidden states (B, L, E) look at media (B, M, D)."""

    def __init__(
        self,
        dim: int,
        media_dim: int,
        num_heads: int = 8,
        head_dim: int = 64,
        feed_forward_factor: int = 4,
        unseen: Unseen = "zero",
    ) -> None:
        """Build the layers.

        Args:
            dim: E.
            media_dim: D.
            num_heads: of the attention.
            head_dim: P.
            feed_forward_factor: how much wider than E the feed-forward part is.
            unseen: what a position finds that may look at no medium (`attend_media`).
        """
        inner_dim, wide = num_heads * head_dim, feed_forward_factor * dim
        norm = nn.LayerNorm(dim)
        super().__init__(MediaAttention(norm, dim, media_dim, inner_dim, num_heads, unseen))
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, wide, bias=False),
            nn.GELU(),
            nn.Linear(wide, dim, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, media: Tensor, mask: Tensor | None, key_value: Tensor | None = None
    ) -> Tensor:
        """Return hidden states (B, L, E); the arguments are those of `MediaAttention`."""
        x = x + self.attention_gate.tanh() * self.attention(x, media, mask, key_value)
        return x + self.feed_forward_gate.tanh() * self.feed_forward(x)


# Where OpenFlamingo's checkpoints keep block {i}, that of decoder layer i. Released ones have it in
# the decoder layers of the language model they were trained with; a whole state dict has the same
# tensors under "open_flamingo" once more.
_PLACES = {
    "open_flamingo": "gated_cross_attn_layers.{i}.",
    "open_flamingo_mpt": "transformer.blocks.{i}.gated_cross_attn_layer.",
    "open_flamingo_llama": "model.layers.{i}.gated_cross_attn_layer.",
    "open_flamingo_neox": "gpt_neox.layers.{i}.gated_cross_attn_layer.",
}


def gated_cross_attention_keys(layers: Sequence[int], ours: str) -> dict[str, KeyTable]:
    """Return {format: {published key: our key}} of OpenFlamingo's checkpoints.

    Args:
        layers: the decoder layers with a block before them, in order, counted from 0.
        ours: name of our list of blocks and a dot, such as "blocks.".
    """
    parts = {
        "attn.norm.weight": "attention.norm.weight",
        "attn.norm.bias": "attention.norm.bias",
        "attn.to_q.weight": "attention.query.weight",
        "attn.to_kv.weight": "attention.key_value.weight",
        "attn.to_out.weight": "attention.output.weight",
        "attn_gate": "attention_gate",
        "ff.0.weight": "feed_forward.0.weight",
        "ff.0.bias": "feed_forward.0.bias",
        "ff.1.weight": "feed_forward.1.weight",
        "ff.3.weight": "feed_forward.3.weight",
        "ff_gate": "feed_forward_gate",
    }
    tables = {}
    for name, place in _PLACES.items():
        roots = [f"lang_encoder.{place.format(i=i)}" for i in layers]
        keys = {
            root + theirs: f"{ours}{number}.{own}"
            for number, root in enumerate(roots)
            for theirs, own in parts.items()
        }
        tables[name] = KeyTable(keys, [root.removesuffix(".") for root in roots])
    return tables


def gated_layers(num_layers: int, every: int) -> list[int]:
    """Return the decoder layers that a block stands before: each `every`-th, counted from 0.

    The reference's `cross_attn_every_n_layers`: with 4, layers 3, 7, 11 and so on.
    """
    return list(range(every - 1, num_layers, every))
