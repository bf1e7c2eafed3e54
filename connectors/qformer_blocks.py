"""What is a Q-Former? BERT whose learned queries also look at a picture, beside a text or alone.

Shapes: T views, K features of a view, D encoder width, Q queries, L text tokens, C hidden width.

Surprises:
- Norms come after each residual sum (post-LN), with BERT's eps 1e-12.
- Queries and text attend to each other in one self-attention, but only queries look at the
  features (every second layer), and each has feed-forward layers of its own.
- Queries have no positions. One norm, BERT's of its embeddings, is applied to queries and text.
- Text positions count from 0; the queries before them take none.

Follows `lavis/models/blip2_models/Qformer.py` of salesforce/LAVIS and transformers'
`modeling_blip_2.py`, `modeling_instructblip.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from connectors.attention import attend_in_steps
from connectors.errors import UserError
from connectors.float32 import Float32Module
from connectors.views import TextInput

BERT_WIDTH = 768


@dataclass(frozen=True, kw_only=True)
class QFormerSize:
    """The numbers of a Q-Former; the defaults are BERT base's and BLIP-2's."""

    vision_dim: int  # D
    num_queries: int = 32  # Q
    hidden_dim: int = 768  # C
    num_layers: int = 12
    num_heads: int = 12
    feed_forward_dim: int = 3072
    cross_attention_every: int = 2  # layers 0, 2, 4, ... look at the features
    dropout: float = 0.1
    eps: float = 1e-12
    vision_norm_eps: float | None = None  # norm of the features before all; None: they come normed
    vocab_size: int | None = None  # None: no text, as in BLIP-2's second stage
    max_num_positions: int = 512
    # Whether the text's own output is wanted. Without, the last layer does not compute it.
    text_output: bool = False


class QFormerOutput(NamedTuple):
    """The last layer's rows."""

    queries: Tensor | None  # (T, Q, C)
    text: Tensor | None  # (T, L, C)


class Attention(nn.Module):
    """Attention, its residual path and its norm."""

    def __init__(self, size: QFormerSize, context_dim: int) -> None:
        super().__init__()
        dim = size.hidden_dim
        self.num_heads = size.num_heads
        self.dropout = size.dropout
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim, dim)
        self.to_v = nn.Linear(context_dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=size.eps)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Let x (T, N, C) look at context (T, K, context_dim) where mask (T, [N,] K) is True."""
        dropout = self.dropout if self.training else 0.0
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        mixed = attend_in_steps(query, key, value, self.num_heads, mask, dropout=dropout)
        return self.norm(x + F.dropout(self.to_out(mixed), dropout))


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, a residual path and a norm."""

    def __init__(self, size: QFormerSize) -> None:
        super().__init__()
        self.dropout = nn.Dropout(size.dropout)
        self.up = nn.Linear(size.hidden_dim, size.feed_forward_dim)
        self.down = nn.Linear(size.feed_forward_dim, size.hidden_dim)
        self.norm = nn.LayerNorm(size.hidden_dim, eps=size.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, N, C) to the same shape."""
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class QFormerLayer(nn.Module):
    """Self-attention of queries and text; the queries' look at the features; feed-forward."""

    def __init__(self, size: QFormerSize, *, looks: bool, has_text: bool) -> None:
        super().__init__()
        self.attention = Attention(size, size.hidden_dim)
        self.cross_attention = Attention(size, size.vision_dim) if looks else None
        self.query_feed_forward = FeedForward(size)
        self.text_feed_forward = FeedForward(size) if has_text else None

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        mask: Tensor | None,
        features: Tensor | None,
        feature_mask: Tensor | None,
    ) -> Tensor:
        """Map hidden (T, N, C), the first `num_queries` rows queries and the others text.

        A layer without feed-forward for text gives the queries' rows alone.
        """
        if self.text_feed_forward is None:
            queries, text = self.attention(hidden[:, :num_queries], hidden, mask), None
        else:
            rows = self.attention(hidden, hidden, mask)
            queries, text = rows[:, :num_queries], rows[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross_attention is not None:
                assert features is not None
                queries = self.cross_attention(queries, features, feature_mask)
            parts.append(self.query_feed_forward(queries))
        if text is not None and text.shape[1]:
            assert self.text_feed_forward is not None
            parts.append(self.text_feed_forward(text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class QFormer(Float32Module):
    """Q learned queries that read a view's features, beside a text or alone.

    Stays in float32 in a half-precision model, as BLIP-2's published weights are meant to be used.
    """

    def __init__(self, size: QFormerSize) -> None:
        super().__init__()
        self.size = size
        dim, has_text = size.hidden_dim, size.vocab_size is not None
        self.queries = nn.Parameter(torch.empty(size.num_queries, dim))
        norm_eps = size.vision_norm_eps
        self.vision_norm = (
            nn.LayerNorm(size.vision_dim, eps=norm_eps) if norm_eps is not None else None
        )
        if size.vocab_size is not None:
            self.word_embeddings = nn.Embedding(size.vocab_size, dim)
            self.position_embeddings = nn.Embedding(size.max_num_positions, dim)
        self.norm = nn.LayerNorm(dim, eps=size.eps)
        self.dropout = nn.Dropout(size.dropout)
        last = size.num_layers - 1
        self.layers = nn.ModuleList(
            QFormerLayer(
                size,
                looks=i % size.cross_attention_every == 0,
                has_text=has_text and (i < last or size.text_output),
            )
            for i in range(size.num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set new weights as BERT does: N(0, 0.02), biases 0.

        0.02 suits BERT's width. In a narrower Q-Former it would leave each layer a few per cent of
        a row, so that pictures hardly reach the queries; there it grows as 1 / sqrt(C).
        """
        std = 0.02 * (BERT_WIDTH / self.size.hidden_dim) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries, std=0.02)

    def forward(
        self,
        features: Tensor | None,
        text: TextInput | None = None,
        *,
        feature_mask: Tensor | None = None,
        causal_text: bool = False,
    ) -> QFormerOutput:
        """Read features and text.

        Args:
            features: (T, K, D), or None for a text alone; then there are no queries.
            text: one for each view, or None.
            feature_mask: (T, K), True where a feature is real; all by default.
            causal_text: text looks at the queries and the text before it, and queries at queries
                alone (caption loss); by default all look at all.

        Raises:
            UserError: the text is longer than there are positions.
        """
        dtype = self.queries.dtype
        parts = []
        if features is not None:
            parts.append(self.queries.expand(len(features), -1, -1))
            features = features.to(dtype)
            if self.vision_norm is not None:
                features = self.vision_norm(features)
        if text is not None:
            parts.append(self._embed(text.ids))
        hidden = self.dropout(self.norm(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)))
        num_queries = 0 if features is None else self.size.num_queries
        mask = None if text is None else visible(num_queries, text.mask, causal=causal_text)
        for layer in self.layers:
            hidden = layer(hidden, num_queries, mask, features, feature_mask)
        return QFormerOutput(
            hidden[:, :num_queries] if num_queries else None,
            hidden[:, num_queries:] if text is not None and self.size.text_output else None,
        )

    def _embed(self, ids: Tensor) -> Tensor:
        """Return words and positions of ids (T, L) as (T, L, C)."""
        if ids.shape[1] > self.size.max_num_positions:
            raise UserError(
                f"the Q-Former takes texts of {self.size.max_num_positions} tokens, but one has "
                f"{ids.shape[1]}; cut it where it is tokenised, or raise max_num_positions"
            )
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.word_embeddings(ids) + self.position_embeddings(positions)


def visible(num_queries: int, text_mask: Tensor, *, causal: bool) -> Tensor:
    """Return who may look at whom: True where row i may look at column j.

    Args:
        num_queries: Q; they stand before the text and are all real.
        text_mask: (T, L), False where padding stands.
        causal: see `QFormer.forward`.

    Returns:
        (T, Q + L), the same for all rows; if causal, (T, Q + L, Q + L).
    """
    real = F.pad(text_mask.bool(), (num_queries, 0), value=True)
    if not causal:
        return real
    length = real.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    earlier[:num_queries, :num_queries] = True
    return real[:, None] & earlier
