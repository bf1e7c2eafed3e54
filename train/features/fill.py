"""How are pictures encoded before a stage's first step, and their features stored?

Shapes: T views, S view size, H W feature grid, D encoder width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_recipes.feature_store import FeatureStore, entry_key
from data_recipes.feature_writer import FeatureWriter
from data_recipes.pictures import PictureViews, Shown, Views
from train.features.key import VIEWS_PER_PASS, EncoderRun
from vlm.image_processing import VlmImageProcessor


def fill(
    store: FeatureStore,
    shown: Sequence[Shown],
    run: EncoderRun,
    image_processor: VlmImageProcessor,
    workers: int,
    budget: int,
    progress: bool,
) -> int:
    """Store the features of pictures; return how many files could not be read.

    Args:
        store: what was stored before; it has to be opened again to see what is stored here.
        shown: the pictures.
        run: the encoder.
        image_processor: what cuts pictures for it.
        workers: processes that decode.
        budget: most bytes that may be written.
        progress: whether a line on the terminal counts pictures.

    Raises:
        NoRoomError: the budget or the disk is used up; what is stored so far stays.
    """
    unreadable = 0
    # A generator of its own: an iterator draws a seed, and the global one belongs to the training.
    loader = DataLoader(
        PictureViews(shown, image_processor, store),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
    )
    bar = tqdm(total=len(shown), desc="features", unit="picture", disable=not progress)
    with FeatureWriter(store.folder, store.layout, budget) as writer, bar:

        def to_encode() -> Iterator[Views]:
            nonlocal unreadable
            begun: set[bytes] = set()  # one picture may lie in several files
            for item in loader:
                bar.update()
                if item is None:
                    unreadable += 1
                    continue
                writer.note(item.state, item.picture)
                key = entry_key(item.picture, item.grid)
                if item.pixel_values is not None and key not in begun:
                    begun.add(key)
                    yield item

        for item, maps in encoded(to_encode(), run):
            writer.add(item.picture, item.grid, maps)
    return unreadable


def encoded(items: Iterable[Views], run: EncoderRun) -> Iterator[tuple[Views, list[Tensor]]]:
    """Yield pictures with their maps (T, H, W, D); passes have one size, blank views fill the last.

    So the features of a picture do not depend on which others are encoded with it.
    """
    waiting: deque[Views] = deque()
    views: list[Tensor] = []  # not encoded yet
    maps: list[Tensor] = []  # of the first of the waiting pictures
    for item in items:
        assert item.pixel_values is not None
        waiting.append(item)
        views.append(item.pixel_values)
        while sum(map(len, views)) >= VIEWS_PER_PASS:
            together = torch.cat(views)
            views = [together[VIEWS_PER_PASS:]]
            maps = _join(maps, run.encode(together[:VIEWS_PER_PASS]))
        while waiting and maps and len(maps[0]) >= _count(waiting[0]):
            count = _count(waiting[0])
            yield waiting.popleft(), [each[:count] for each in maps]
            maps = [each[count:] for each in maps]
    if waiting:
        together = torch.cat(views)
        blanks = together.new_zeros(VIEWS_PER_PASS - len(together), *together.shape[1:])
        maps = _join(maps, run.encode(torch.cat([together, blanks])))
    for item in waiting:
        yield item, [each[: _count(item)] for each in maps]
        maps = [each[_count(item) :] for each in maps]


def _count(item: Views) -> int:
    assert item.pixel_values is not None
    return len(item.pixel_values)


def _join(earlier: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Return maps of views one after the other."""
    return [torch.cat(pair) for pair in zip(earlier, new, strict=True)] if earlier else new
