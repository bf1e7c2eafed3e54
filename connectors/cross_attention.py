"""How do hidden states look at media when some of them may see none?

Shapes: B batch, L positions, M media tokens of a row, E language-model width, D media width, I
width of the attention, P channels of a head.

Surprises:
- A softmax over no keys at all is 0 / 0. That torch's kernels make zeros of it is promised nowhere,
  and a NaN would reach the gradients even of what is not used. Such positions therefore look at
  everything, and what they saw is put aside afterwards.
- Without any media (M = 0) queries, keys and values still take part, with gradients of zero, so
  that every rank of a distributed run trains the same parameters. A sum over an empty slice is 0
  whatever the numbers are; 0 * sum is not, should one be infinite.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from connectors.attention import attend
from connectors.fusion import FusionContext, Media, Scope

Unseen = Literal["zero", "uniform"]


def attend_media(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mask: Tensor | None,
    unseen: Unseen = "zero",
) -> Tensor:
    """Return what each position finds in the media it may see.

    Args:
        query: (B, L, num_heads * P).
        key: (B, M, num_heads * P).
        value: as `key`.
        num_heads: of the attention.
        mask: (B, L, M) bool, True where a position may look; None: everywhere.
        unseen: what a position gets that may look at nothing: zeros, or the mean of all values of
            its row.

    Returns:
        (B, L, num_heads * P).
    """
    if key.shape[1] == 0:
        nothing = query[..., :0].sum() + key.sum() + value.sum()
        return torch.zeros_like(query) + nothing.to(query.dtype)
    if mask is None:
        return attend(query, key, value, num_heads)
    sees = mask.any(-1, keepdim=True)  # (B, L, 1)
    found = attend(query, key, value, num_heads, mask | ~sees)
    other = torch.zeros_like(found) if unseen == "zero" else value.mean(1, keepdim=True)
    return torch.where(sees, found, other)


class MediaAttention(nn.Module):
    """Normed hidden states (B, L, E) look at media (B, M, D) as they come; no bias."""

    def __init__(
        self,
        norm: nn.Module,
        dim: int,
        media_dim: int,
        inner_dim: int,
        num_heads: int,
        unseen: Unseen = "zero",
    ) -> None:
        """Build the layers.

        Args:
            norm: of the hidden states.
            dim: E.
            media_dim: D.
            inner_dim: I, which `num_heads` divides.
            num_heads: of the attention.
            unseen: what a position finds that may look at no medium (`attend_media`).
        """
        super().__init__()
        self.media_dim = media_dim
        self.num_heads = num_heads
        self.unseen: Unseen = unseen
        self.norm = norm
        self.query = nn.Linear(dim, inner_dim, bias=False)
        self.key_value = nn.Linear(media_dim, 2 * inner_dim, bias=False)
        self.output = nn.Linear(inner_dim, dim, bias=False)

    def read_media(self, media: Tensor) -> Tensor:
        """Return keys and values side by side, (B, M, 2 * I), of media (B, M, D).

        They are the same for every later token: a cache keeps them, not the media.
        """
        return self.key_value(media)

    def forward(
        self, x: Tensor, media: Tensor, mask: Tensor | None, key_value: Tensor | None = None
    ) -> Tensor:
        """Return what hidden states (B, L, E) find, as them.

        Args:
            x: (B, L, E).
            media: (B, M, D); M may be 0.
            mask: (B, L, M) bool, True where a position may look; None: everywhere.
            key_value: what `read_media` gave of these media, if it is at hand.
        """
        key_value = self.read_media(media) if key_value is None else key_value
        key, value = key_value.chunk(2, dim=-1)
        query = self.query(self.norm(x))
        return self.output(attend_media(query, key, value, self.num_heads, mask, self.unseen))


class MediaBlock(nn.Module):
    """Base of what stands at a decoder layer and looks at media; `forward` has its arguments."""

    def __init__(self, attention: MediaAttention) -> None:
        super().__init__()
        self.attention = attention

    def pass_through(
        self, hidden: Tensor, context: FusionContext, media: Media | None, scope: Scope, name: str
    ) -> Tensor:
        """Return the hidden states (B, L, E) that go on from the block's place in a call.

        Args:
            hidden: (B, L, E).
            context: of the call.
            media: of its rows; None: there was no image so far.
            scope: which of them a position may look at.
            name: under which keys and values are kept.
        """
        if media is None:
            # In the same order as with media: ranks put the weights in pieces together as they run.
            nothing = hidden.new_zeros(len(hidden), 0, self.attention.media_dim)
            return self(hidden, nothing, None, self.attention.read_media(nothing))
        mask = context.attend(media, scope).to(hidden.device)
        tokens = media.tokens.to(hidden)
        return self(hidden, tokens, mask, media.read(name, self.attention.read_media, tokens))
