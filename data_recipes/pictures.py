"""What does an encoder need of pictures: their views, or the features that it stored before?

Shapes: T views, S view size, H W feature grid, D encoder width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_recipes.feature_store import (
    FeatureStore,
    LostFeaturesError,
    Picture,
    as_size,
    content_of,
    state_of,
)
from data_recipes.image_files import MediaFile, VideoFile, load_media, read, shown_size
from vlm import video_times
from vlm.errors import UserError
from vlm.image_processing import VlmImageProcessor
from vlm.images import image_size, load_image
from vlm.tiling import Size, is_video


@dataclass(frozen=True)
class Shown:
    """A picture in a conversation of `siblings` pictures, itself among them; or a video."""

    file: MediaFile
    siblings: int


@dataclass(frozen=True)
class Views:
    """A picture to encode; `pixel_values` (T, 3, S, S) is None where its features are stored."""

    picture: Picture
    state: bytes
    grid: Size
    pixel_values: Tensor | None


class PictureViews(Dataset):
    """Map-style: pictures as the encoder sees them; None for a file that is no whole picture.

    Whoever trains on that file is told what is wrong with it.
    """

    def __init__(
        self, shown: Sequence[Shown], image_processor: VlmImageProcessor, store: FeatureStore
    ) -> None:
        self.shown = shown
        self.image_processor = image_processor
        self.store = store

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, number: int) -> Views | None:
        file, siblings = self.shown[number].file, self.shown[number].siblings
        try:
            state, data = state_of(file), read(file)
            if isinstance(file, VideoFile):
                picture = Picture(content_of(data), as_size(shown_size(file)))
            else:
                picture = Picture(content_of(data), image_size(data, str(file)))
            grid = grid_of(picture, siblings, self.image_processor)
            if self.store.has(picture, grid):
                return Views(picture, state, grid, None)
            if isinstance(file, VideoFile):
                views = self.image_processor.frame_views(file.frames())
            else:
                views = self.image_processor.views(load_image(data, name=str(file)), siblings)
        except (OSError, UserError):
            return None
        return Views(picture, state, grid, self.image_processor.normalize(views))


def is_stored(
    shown: Shown, image_processor: VlmImageProcessor, store: FeatureStore, reading: bool = False
) -> bool:
    """Return whether a file's state is known and the features of its picture are stored.

    With `reading`, a file whose state is not known is read to tell which picture it holds: another
    machine's copy of the file has a state of its own.
    """
    try:
        known = store.identify if reading else store.known
        picture = known(shown.file)
    except (OSError, UserError):
        return False
    return picture is not None and store.has(
        picture, grid_of(picture, shown.siblings, image_processor)
    )


def grid_of(picture: Picture, siblings: int, image_processor: VlmImageProcessor) -> Size:
    """Return what a picture is cut into in a conversation of so many; (0, n) of a video."""
    if is_video(picture.size):
        return picture.size
    return image_processor.plan(picture.size, siblings).grid


def stored_features(
    files: Sequence[MediaFile], image_processor: VlmImageProcessor, store: FeatureStore
) -> tuple[list[video_times.Shown], list[Tensor]]:
    """Return what counts the tokens of one conversation's pictures, and maps (T, H, W, D) joined.

    Raises:
        UserError: a picture cannot be read.
        LostFeaturesError: its features are not stored (any more), or it was changed meanwhile.
    """
    sizes, maps = [], []
    siblings = num_pictures(files)
    for file in files:
        try:
            picture = store.identify(file)
        except OSError:
            load_media(file)  # says what is wrong
            raise
        found = store.features(picture, grid_of(picture, siblings, image_processor))
        if found is None:
            load_media(file)
            raise LostFeaturesError(
                f"image {file} was changed after its features had been stored; "
                "the same command stores them and goes on"
            )
        sizes.append(_shown(file, picture))
        maps.append(found)
    return sizes, [torch.cat(views) for views in zip(*maps, strict=True)]


def _shown(file: MediaFile, picture: Picture) -> video_times.Shown:
    """Return what counts the tokens of a picture; a video is opened only where its times matter."""
    if not isinstance(file, VideoFile):
        return picture.size
    return file.shown() if file.config.time_instruction else video_times.ShownVideo(picture.size[1])


def num_pictures(files: Sequence[MediaFile]) -> int:
    """Return how many of a conversation's files are pictures, not videos."""
    return sum(not isinstance(file, VideoFile) for file in files)
