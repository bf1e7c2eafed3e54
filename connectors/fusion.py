"""What do connectors inside the language model know of it, and of the forward pass they are in?

Shapes: B batch, L sequence of this call, E language-model width, T views, K image tokens of the
batch, M media tokens of a row (those of padding included).

Surprises:
- A context belongs to one call of the model and travels with it as an argument, so that gradient
  checkpointing computes a layer again with the context it had, whatever ran in between.
- With a cache, a call sees the new positions only. What is not known from those (media, and which
  image came last) is carried in `Media`, row by row, beside the keys and values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Where = Literal["before", "after_attention", "after"]
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
Scope = Literal["latest", "previous", "document"]
ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class HostLinear:
    """One linear layer of a decoder layer.

    Attributes:
        name: its path in the decoder layer, such as "self_attn.q_proj".
        roles: what it computes; several where a model joins them ("qkv_proj").
        in_dim: width of its input.
        out_dim: width of its output.
        bias: whether it adds one.
    """

    name: str
    roles: tuple[Role, ...]
    in_dim: int
    out_dim: int
    bias: bool


@dataclass(frozen=True)
class HostShape:
    """The language model as connectors inside it need to know it: numbers only.

    Attributes:
        model_type: transformers' name of its family.
        hidden_dim: E.
        num_heads: heads of its attention.
        num_key_heads: heads of its keys and values.
        head_dim: channels of a head.
        norm_eps: of its norms.
        layers: the linear layers of each decoder layer.
    """

    model_type: str
    hidden_dim: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[tuple[HostLinear, ...], ...]

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers."""
        return len(self.layers)


@dataclass(frozen=True)
class LayerSite:
    """A place at a decoder layer where hidden states pass.

    "before" and "after" the layer, or "after_attention": between its attention (with the residual
    added) and its feed-forward part.
    """

    layer: int
    where: Where


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of a decoder layer, by its path in it."""

    layer: int
    name: str


@dataclass
class Media:
    """What the tokens of each row may attend to.

    Attributes:
        tokens: (B, M, width).
        images: (B, M) number of the image that each belongs to, rising along a row; -1: padding.
        documents: (B, M) number of the image's document in its row.
        projected: what a connector computed of `tokens` for each of its sites, once per request:
            tensors (B, ...), by the site's name.
    """

    tokens: Tensor
    images: Tensor
    documents: Tensor
    projected: dict[str, Tensor] = field(default_factory=dict)

    def read(self, name: str, function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Return what `function` makes of the tokens; kept for later calls that train nothing.

        What training computes belongs to its graph, and is computed again in the backward pass.
        """
        if torch.is_grad_enabled():
            return function(tokens)
        if name not in self.projected:
            self.projected[name] = function(tokens)
        return self.projected[name]


@dataclass
class FusionContext:
    """One call of the language model, as the connectors inside it see it.

    Attributes:
        images: (B, L) number of the image that each position belongs to; -1: text.
        latest: (B, L) number of the image that began last in the position's document, itself
            included; -1: none did.
        documents: (B, L) number of the position's document in its row.
        rows: (K,) places of the image tokens in the flattened batch (B * L).
        sides: what each part of the connector gave: tensors with one row per image token (K, ...)
            or `Media`, by the part's number.
        run_all: the parameters must take part even where there is no image: other ranks train
            them, or hold a share of them (ZeRO-3).
    """

    images: Tensor
    latest: Tensor
    documents: Tensor
    rows: Tensor
    sides: Mapping[int, Sequence[Tensor] | Media]
    run_all: bool
    _masks: dict[Scope, Tensor] = field(default_factory=dict)

    @cached_property
    def inner_rows(self) -> Tensor:
        """Return `rows` without the last token of each image (CogVLM's `eoi`)."""
        images = self.images
        goes_on = torch.zeros_like(images, dtype=torch.bool)
        goes_on[:, :-1] = images[:, 1:] == images[:, :-1]
        return (goes_on & (images >= 0)).flatten().nonzero()[:, 0]

    @cached_property
    def saved_positions(self) -> Tensor:
        """Return how many positions were saved up to each token, (B, L), its document's alone.

        Where the inner tokens of an image share one position, as CogVLM's patches do:

            text  boi  patch  patch  patch  eoi  text
               0    1      2      2      2    3     4    positions
               0    0      0      1      2    2     2    saved
        """
        images, documents = self.images, self.documents
        joins = (images[:, 1:] == images[:, :-1]) & (images[:, 1:] >= 0)  # belongs to its left one
        border = torch.zeros_like(images[:, :1], dtype=torch.bool)
        left, right = torch.cat([border, joins], dim=1), torch.cat([joins, border], dim=1)
        inner = left & right
        saved = (inner & torch.cat([border, inner[:, :-1]], dim=1)).long().cumsum(-1)
        starts = torch.cat([~border, documents[:, 1:] != documents[:, :-1]], dim=1)
        return saved - torch.where(starts, saved, 0).cummax(-1).values

    def attend(self, media: Media, scope: Scope) -> Tensor:
        """Return which media each position may look at, (B, L, M) bool.

        Args:
            media: as long as in earlier calls of this context.
            scope: "latest": the image that began last; "previous": all that have begun;
                "document": all of the document, later ones too. Never another document's.
        """
        if scope not in self._masks:
            images, documents = media.images[:, None], media.documents[:, None]  # (B, 1, M)
            mask = (images >= 0) & (documents == self.documents[..., None])
            if scope == "latest":
                mask = mask & (images == self.latest[..., None])
            elif scope == "previous":
                mask = mask & (images <= self.latest[..., None])
            self._masks[scope] = mask
        return self._masks[scope]


def linears_of(host: HostShape, roles: Sequence[Role]) -> list[list[HostLinear]]:
    """Return, for each decoder layer, its linear layers that have any of the roles."""
    return [[linear for linear in layer if set(linear.roles) & set(roles)] for layer in host.layers]
