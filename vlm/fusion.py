"""How does a batch with images become the context of the connectors inside the language model?

Shapes: B batch, L sequence of this call, T views, n images, N tokens of a view, K image tokens of
the batch, M media tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from connectors.chain import ConnectorChain
from connectors.fusion import FusionContext, Media
from vlm.fusion_cache import FusionLayer
from vlm.lm_head import document_starts

Side = Sequence[Tensor] | Media


@dataclass(frozen=True)
class Images:
    """The images of one call.

    Attributes:
        tokens: how many tokens each has.
        views: how many views each has.
        per_row: how many of them each row holds, in order.
        beside: turns a tensor (T, N, ...) of what goes with the tokens of all views into one of
            what goes with each image token, (K, ...); 0 with what no view made, the end of a row.
        sides: what the connector's parts gave, tensors (T, ...), by number.
    """

    tokens: Sequence[int]
    views: Sequence[int]
    per_row: Sequence[int]
    beside: Callable[[Tensor], Tensor]
    sides: Mapping[int, Sequence[Tensor]]


def build_context(
    chain: ConnectorChain,
    is_image: Tensor,
    images: Images | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    carried: FusionLayer | None,
    run_all: bool,
) -> FusionContext:
    """Return the context of one call.

    Args:
        chain: the connector.
        is_image: (B, L) where the image tokens are.
        images: None: there are none in this call.
        attention_mask: (B, positions so far) 0 on padding.
        position_ids: (B, L); restarts separate packed documents.
        carried: what the cache holds of earlier positions.
        run_all: see `FusionContext`.
    """
    documents = _documents(is_image, attention_mask, position_ids)
    numbers = torch.full_like(documents, -1)
    count = 0 if carried is None else carried.count
    if images is not None:
        of_tokens = torch.repeat_interleave(
            torch.arange(len(images.tokens), device=numbers.device) + count,
            torch.tensor(images.tokens, device=numbers.device),
        )
        numbers = numbers.masked_scatter(is_image, of_tokens)
    latest = _latest(numbers, documents, None if carried is None else carried.latest)
    sides: dict[int, Side] = {}
    if images is not None:
        for number in chain.by_kind("tokens"):
            sides[number] = [images.beside(x) for x in images.sides[number]]
    for number in chain.by_kind("media"):
        earlier = None if carried is None else carried.media.get(number)
        new = None
        if images is not None:
            (side,) = images.sides[number]
            new = _arrange(side, images, numbers, documents, count)
        if (media := _join(earlier, new)) is not None:
            sides[number] = media
    rows = is_image.flatten().nonzero()[:, 0] if images is not None else documents.new_empty(0)
    return FusionContext(numbers, latest, documents, rows, sides, run_all)


def carry(
    context: FusionContext, images: Images | None, earlier: FusionLayer | None
) -> FusionLayer:
    """Return what the next call with the same cache needs of this one."""
    count = 0 if earlier is None else earlier.count
    media = {n: side for n, side in context.sides.items() if isinstance(side, Media)}
    count += 0 if images is None else len(images.tokens)
    saved = context.saved_positions[:, -1]
    saved = saved if earlier is None else saved + earlier.saved.to(saved.device)
    return FusionLayer(context.latest[:, -1], count, media, saved)


def _documents(
    is_image: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Return the number of each position's document in its row, (B, L)."""
    documents = torch.zeros_like(is_image, dtype=torch.long)
    if attention_mask is not None and attention_mask.shape != is_image.shape:
        return documents  # a cache: its rows are not packed
    starts = document_starts(position_ids, attention_mask)
    if starts is not None:
        documents[:, 1:] = starts.cumsum(-1)
    return documents


def _latest(numbers: Tensor, documents: Tensor, carried: Tensor | None) -> Tensor:
    """Return the image that began last at or before each position, in its document, (B, L)."""
    position = torch.arange(numbers.shape[1], device=numbers.device)
    where = torch.where(numbers >= 0, position, -1).cummax(-1).values
    at = where.clamp(min=0)
    latest = numbers.gather(1, at)
    if carried is not None:
        return torch.where(where >= 0, latest, carried.to(numbers.device)[:, None])
    seen = (where >= 0) & (documents.gather(1, at) == documents)
    return torch.where(seen, latest, -1)


def _arrange(side: Tensor, images: Images, numbers: Tensor, documents: Tensor, count: int) -> Media:
    """Return views' media (T, m, width) row by row, those of shorter rows padded."""
    views: list[list[int]] = []  # of each row
    owners: list[list[int]] = []  # the image of each of those views
    view, image = 0, 0
    for held in images.per_row:
        views.append([])
        owners.append([])
        for _ in range(held):
            number = images.views[image]
            views[-1] += range(view, view + number)
            owners[-1] += [count + image] * number
            view, image = view + number, image + 1
    most = max(1, *map(len, views)) if views else 1
    table = torch.tensor([row + [len(side)] * (most - len(row)) for row in views])
    owner = torch.tensor([row + [-1] * (most - len(row)) for row in owners])
    table, owner = table.to(side.device), owner.to(side.device)
    padded = torch.cat([side, side.new_zeros(1, *side.shape[1:])])
    tokens = padded.index_select(0, table.flatten()).unflatten(0, table.shape).flatten(1, 2)
    owner = owner.repeat_interleave(side.shape[1], dim=1)  # (B, M)
    # The document of an image is that of its tokens; images without any do not exist.
    of_image = documents.new_full((count + len(images.tokens) + 1,), -1)
    own = numbers.flatten().clamp(min=-1)
    of_image = of_image.index_put((own[own >= 0],), documents.flatten()[own >= 0])
    return Media(tokens, owner, of_image[owner])


def _join(earlier: Media | None, new: Media | None) -> Media | None:
    """Return media of earlier calls and of this one side by side."""
    if earlier is None or new is None:
        return new if earlier is None else earlier
    return Media(
        torch.cat([earlier.tokens, new.tokens], dim=1),
        torch.cat([earlier.images, new.images], dim=1),
        torch.cat([earlier.documents, new.documents], dim=1),
    )
