"""What may a connector learn of the views, beside their features?

Shapes: T views, H_i W_i grid of feature map i, L text tokens.

A connector names what it reads (`Connector.reads`), and the model finds that out and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Reading = Literal["padding", "text"]


class TextInput(NamedTuple):
    """A text for each view, in the connector's own vocabulary."""

    ids: Tensor  # (T, L), integers
    mask: Tensor  # (T, L), bool; False where padding stands


@dataclass(frozen=True)
class TextSource:
    """How the texts that a connector reads are made.

    Attributes:
        tokenizer: folder or hub id of the tokenizer; None: nobody has named it.
        vocab_size: how many tokens the connector knows.
        max_length: longest text, in tokens.
    """

    tokenizer: str | None
    vocab_size: int
    max_length: int


@dataclass(frozen=True)
class Views:
    """What is known of T views.

    Attributes:
        shown: for each feature map, (T, H_i, W_i) bool, False where a view is padding; None: the
            views are pictures all over.
        text: what the user asks about each view's image; None: nobody reads it.
    """

    shown: Sequence[Tensor] | None = None
    text: TextInput | None = None


NOTHING_KNOWN = Views()
