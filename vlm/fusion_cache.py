"""How does what connectors need of earlier positions travel with a language model's cache?

Shapes: B batch, M media tokens.

As one more layer of the cache, behind those of the language model: whatever transformers does to
the rows of a cache (beam search reorders them, sampling repeats them) it does to all its layers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from connectors.fusion import Media


class FusionLayer:
    """A layer of a cache that holds no keys.

    Attributes:
        latest: (B,) number of the image that began last in each row; -1: none.
        count: how many images were numbered so far.
        media: what the rows may attend to, by the number of the connector's part.
        saved: (B,) how many positions each row's images have saved (vlm/shared_positions.py).
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, latest: Tensor, count: int, media: dict[int, Media], saved: Tensor) -> None:
        self.latest = latest
        self.count = count
        self.media = media
        self.saved = saved

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on as row `beam_idx` (B)."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.latest, self.saved = function(self.latest), function(self.saved)
        self.media = {
            number: replace(
                media,
                tokens=function(media.tokens),
                images=function(media.images),
                documents=function(media.documents),
                projected={name: function(x) for name, x in media.projected.items()},
            )
            for number, media in self.media.items()
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: what is taken back are drafts of text."""

    def reset(self) -> None:
        """Forget all media."""
        self.latest, self.saved = torch.full_like(self.latest, -1), torch.zeros_like(self.saved)
        self.count, self.media = 0, {}

    def offload(self) -> None:
        """Stay: media are small beside the keys."""

    def prefetch(self) -> None:
        """Nothing was taken away."""

    def get_max_length(self) -> int:
        """Return that there is none."""
        return -1

    def get_seq_length(self) -> int:
        """Return 0: no positions."""
        return 0


def read(cache: Cache | None) -> FusionLayer | None:
    """Return what the connectors left in a cache."""
    layers: list[Any] = [] if cache is None else cache.layers
    return layers[-1] if layers and isinstance(layers[-1], FusionLayer) else None


def write(cache: Cache | None, layer: FusionLayer) -> None:
    """Leave what the connectors need in the next call."""
    if cache is None:
        return
    if read(cache) is not None:
        cache.layers.pop()
    # transformers looks for the first layer that is, or is not, sliding: this must not be it.
    layer.is_sliding = cache.is_sliding[0]
    cache.layers.append(layer)  # pyright: ignore[reportArgumentType] - it has the methods
