"""How do images become the encoder's input: views, normalised, with the grids they were cut into?

Shapes: T views over all images, S view size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from vlm.images import to_rgb
from vlm.tile_grids import pad_to_square, stretch
from vlm.tiling import Size, Tiling, ViewPlan, build_tiling
from vlm.token_layout import num_image_tokens
from vlm.video import SampledVideo, VideoSource, sample_video
from vlm.video_layout import VideoConfig, parse_video
from vlm.video_times import ShownVideo

Medium = Image.Image | SampledVideo


class VlmImagesKwargs(ImagesKwargs, total=False):
    """What `VlmProcessor.__call__` may pass; transformers refuses names not listed here."""

    num_images: list[int]


class VlmImageProcessor(BaseImageProcessor):
    """Cut images by the tiling and normalise the views with the encoder's mean and deviation."""

    valid_kwargs = VlmImagesKwargs
    model_input_names = ["pixel_values", "tile_grids", "image_sizes"]  # noqa: RUF012

    def __init__(
        self,
        view_size: int = 224,
        view_token_grid: Sequence[int] = (16, 16),
        tiling: Mapping[str, Any] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        video: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the numbers of the encoder, the connector and the tiling.

        Args:
            view_size: S, the side of the square the encoder sees.
            view_token_grid: (h, w) tokens the connector makes of one view.
            tiling: config dict of the tiling; None is one stretched view.
            image_mean: per channel, of values in 0..1.
            image_std: per channel, of values in 0..1.
            video: fields of `VideoConfig`; None: the defaults.
            **kwargs: what transformers stores beside them.
        """
        super().__init__(**kwargs)
        self.view_size = view_size
        height, width = view_token_grid
        self.view_token_grid: Size = (height, width)
        self.tiling = dict(tiling) if tiling is not None else {"type": "resize"}
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self._cutter: Tiling = build_tiling(self.tiling)
        self.set_video(video)
        # pixel / 255 normalised = pixel * scale - shift
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        self._scale = (1 / (255 * std)).view(3, 1, 1)
        self._shift = (mean / std).view(3, 1, 1)

    def set_video(self, video: Mapping[str, Any] | None) -> None:
        """Look at videos in another way; None: in the default one."""
        self.video_config: VideoConfig = parse_video(video)
        self.video = None if video is None else dict(video)

    def to_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes: the arguments of `__init__`."""
        return {
            "image_processor_type": type(self).__name__,
            "view_size": self.view_size,
            "view_token_grid": list(self.view_token_grid),
            "tiling": self.tiling,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            # Not written for models that were not told, so that they stay what they were.
            **({} if self.video is None else {"video": self.video}),
        }

    @property
    def mean_color(self) -> tuple[int, int, int]:
        """The mean as a colour: what `pad` fills with, near 0 once normalised."""
        red, green, blue = (int(255 * mean) for mean in self.image_mean)
        return red, green, blue

    def plan(self, image_size: Size, num_images: int = 1) -> ViewPlan:
        """Return the views of an image of (width, height) in a conversation of `num_images`."""
        return self._cutter.plan(*image_size, self.view_size, num_images)

    def num_tokens(self, image_size: Size, num_images: int = 1) -> int:
        """Return the tokens an image of (width, height) takes in a conversation of `num_images`."""
        return self.num_tokens_of_grid(image_size, self.plan(image_size, num_images).grid)

    def num_tokens_of_grid(self, image_size: Size, grid: Size) -> int:
        """Return the tokens of an image of (width, height) that was cut into (rows, cols).

        (0, n) is a video of n frames, whatever their size.
        """
        return num_image_tokens(
            image_size, self._cutter, self.view_size, self.view_token_grid, grid, self.video_config
        )

    def views(self, image: Image.Image, num_images: int = 1) -> list[Image.Image]:
        """Return the square pictures that the encoder sees of one image, in order."""
        return self._cutter.split(to_rgb(image), self.view_size, self.mean_color, num_images)

    def sample(self, source: VideoSource) -> SampledVideo:
        """Return the frames of a video that the model looks at; see `vlm.video.sample_video`."""
        options = self.video_config.sampling()
        return sample_video(source, **options, target_size=self.view_size)

    def frame_views(self, video: SampledVideo) -> list[Image.Image]:
        """Return the square pictures that the encoder sees of a video: one a frame.

        A frame is stretched to the square, or padded, as the tiling says.
        """
        if self._cutter.pads_frames:
            squares = [pad_to_square(to_rgb(frame), self.mean_color) for frame in video.frames]
        else:
            squares = [to_rgb(frame) for frame in video.frames]
        return [stretch(square, (self.view_size, self.view_size)) for square in squares]

    def encode_media(self, media: Sequence[Medium], plans: Sequence[Size]) -> dict[str, Tensor]:
        """Return pixel_values (T, 3, S, S), tile_grids (n, 2) and image_sizes (n, 2).

        Args:
            media: images and videos of one conversation, in the order of their placeholders.
            plans: what `grids` says of them.
        """
        num_images = sum(isinstance(medium, Image.Image) for medium in media)
        views, sizes = [], []
        for medium in media:
            if isinstance(medium, Image.Image):
                views += self.views(medium, num_images)
                sizes.append(medium.size)
            else:
                views += self.frame_views(medium)
                sizes.append(medium.frames[0].size)
        return {"pixel_values": self.normalize(views), **grids_and_sizes(plans, sizes)}

    @property
    def pads_frames(self) -> bool:
        """Whether a video's frames are put on a square, not stretched."""
        return self._cutter.pads_frames

    def grids(self, shown: Sequence[Size | ShownVideo]) -> list[Size]:
        """Return the rows of `tile_grids` of one conversation.

        Args:
            shown: (width, height) of an image, or a video, in order.
        """
        num_images = sum(not isinstance(item, ShownVideo) for item in shown)
        return [
            (0, item.num_frames)
            if isinstance(item, ShownVideo)
            else self.plan(item, num_images).grid
            for item in shown
        ]

    def normalize(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, views: Sequence[Image.Image]
    ) -> Tensor:
        """Return RGB views as the encoder's input (T, 3, S, S), float32."""
        pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views]))
        return pixels.permute(0, 3, 1, 2).mul(self._scale).sub_(self._shift).contiguous()

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Image.Image | Sequence[Image.Image],
        num_images: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return pixel_values (T, 3, S, S), tile_grids (n, 2) rows, cols, image_sizes (n, 2) h, w.

        Args:
            images: decoded images, of one conversation or of several one after the other.
            num_images: images per conversation; None: all are of one conversation.
            **kwargs: accepted for callers that pass every processor the same options; unused.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        counts = [len(images)] if num_images is None else [n for n in num_images if n]
        assert sum(counts) == len(images), (counts, len(images))
        siblings = [count for count in counts for _ in range(count)]
        views = []
        for image, count in zip(images, siblings, strict=True):
            views.extend(self.views(image, count))
        sizes = [image.size for image in images]
        grids = [self.plan(size, count).grid for size, count in zip(sizes, siblings, strict=True)]
        return BatchFeature(
            {"pixel_values": self.normalize(views), **grids_and_sizes(grids, sizes)}
        )


def grids_and_sizes(grids: Sequence[Size], sizes: Sequence[Size]) -> dict[str, Tensor]:
    """Return tile_grids (n, 2) rows, cols and image_sizes (n, 2) height, width."""
    turned = [(height, width) for width, height in sizes]
    return {"tile_grids": torch.tensor(grids), "image_sizes": torch.tensor(turned)}
