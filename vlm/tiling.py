"""Into which square views is an image cut, and in which order?

Shapes: a grid is (rows, cols) of tiles; sizes in pixels are (width, height), as PIL gives them.
Surprises kept for the sake of published checkpoints: the base view of `anyres` is stretched, not
padded, and its tiles are padded with black while `pad` uses the encoder's mean colour; `dynamic`
compares aspect ratios by difference, so a picture and its transpose may get different grids. The
base view of `hd` shows the padding too, and is sampled without smoothing.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from PIL import Image

from connectors.config import config_from_mapping
from connectors.registry import lookup
from vlm.errors import UserError
from vlm.tile_grids import (
    Color,
    Size,
    best_fitting_grid,
    cut_tiles,
    fit_inside,
    hd_size,
    nearest_grid,
    pad_to_square,
    sample,
    stretch,
    stretch_along,
)

# LLaVA-NeXT's list (llava-v1.6 configs, there in pixels and (width, height)); ties go to the first.
NEXT_GRIDS: tuple[Size, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
_GRID_RANGE = re.compile(r"\s*\((\d+)x(\d+)\)\s*,\s*\.\.\.\s*,\s*\((\d+)x(\d+)\)\s*")


@dataclass(frozen=True)
class ViewPlan:
    """The views of one image: a grid of tiles, row by row, and perhaps the whole image too."""

    rows: int
    cols: int
    whole: Literal["none", "first", "last"] = "none"
    frames: int = 0  # of a video, which has a view for each and no tiles

    @property
    def grid(self) -> Size:
        """(rows, cols) of the tiles; (0, 0) when the whole is the only view, (0, n) of n frames."""
        return (0, self.frames) if self.frames else (self.rows, self.cols)

    @property
    def num_views(self) -> int:
        """T, the number of views of this image or video."""
        return self.frames or self.rows * self.cols + (self.whole != "none")


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Base of all tilings: pure functions of the image's size. Here: one view, one tile.

    Attributes:
        pads: whether the image is put on a canvas of the tiles' shape, not stretched to it.
        pads_whole: whether the view of the whole image shows that canvas, padding and all.
        pads_frames: whether a video's frames are put on a square, as `pad` does, not stretched.
    """

    pads: ClassVar[bool] = False
    pads_whole: ClassVar[bool] = False
    pads_frames: ClassVar[bool] = False

    @property
    def is_mosaic(self) -> bool:
        """Whether the tiles' tokens are laid out row by row of the whole picture."""
        return False

    @property
    def unpads(self) -> bool:
        """Whether tokens that saw only padding are left out of the mosaic."""
        return False

    @property
    def has_newline(self) -> bool:
        """Whether rows of tokens end in a learned newline, which the model then owns."""
        return self.unpads

    @property
    def has_separator(self) -> bool:
        """Whether the whole image's rows end so too, and a learned separator comes after them.

        Both are then learned before the connector's projection (vlm/row_ends.py).
        """
        return False

    def plan(self, width: int, height: int, view_size: int, num_images: int = 1) -> ViewPlan:
        """Return the views of one (width, height) image of a conversation with `num_images`."""
        return ViewPlan(1, 1)

    def plan_of_grid(self, grid: Size) -> ViewPlan:
        """Return the plan that has this (rows, cols) grid; the inverse of `plan(...).grid`."""
        return ViewPlan(*grid)

    def split(
        self, image: Image.Image, view_size: int, mean_color: Color, num_images: int = 1
    ) -> list[Image.Image]:
        """Cut an RGB image into its views, each (view_size, view_size), in the plan's order."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ResizeTiling(Tiling):
    """One view: the whole image stretched to the square."""

    def split(
        self, image: Image.Image, view_size: int, mean_color: Color, num_images: int = 1
    ) -> list[Image.Image]:
        """Return the one stretched view."""
        return [stretch(image, (view_size, view_size))]


@dataclass(frozen=True, kw_only=True)
class PadTiling(Tiling):
    """One view: the whole image on a square of the mean colour (LLaVA-1.5's `expand2square`).

    With `unpad`, rows and columns of tokens that saw only padding are left out, and each row ends
    in a newline, as Cambrian-1 has it.
    """

    unpad: bool = False

    pads: ClassVar[bool] = True
    pads_frames: ClassVar[bool] = True

    @property
    def is_mosaic(self) -> bool:
        """Whether the tile's tokens are laid out row by row."""
        return self.unpad

    @property
    def unpads(self) -> bool:
        """Whether tokens that saw only padding are left out of the mosaic."""
        return self.unpad

    def split(
        self, image: Image.Image, view_size: int, mean_color: Color, num_images: int = 1
    ) -> list[Image.Image]:
        """Return the one padded view."""
        return [stretch(pad_to_square(image, mean_color), (view_size, view_size))]


@dataclass(frozen=True, kw_only=True)
class AnyresTiling(Tiling):
    """LLaVA-NeXT's AnyRes: the whole image, then the tiles of the best fitting grid.

    A 672x336 image at 336-pixel views takes the grid (1, 2): three views, the stretched whole, the
    left half, the right half. Its tokens (`token_layout`): p * p of the whole, then p rows of 2 p
    tokens and a newline each. A 600x400 one takes (2, 2), is scaled to 672x448, and loses the rows
    of tokens that saw only padding.
    """

    # (rows, cols) to choose from, or a range such as "(1x1),...,(6x6)" (LLaVA-OneVision).
    grids: tuple[tuple[int, int], ...] | str = NEXT_GRIDS
    # N of anyres_max_N: features of more than 1.21 N tiles are shrunk; None keeps them all.
    max_tiles: int | None = None
    # False: no unpadding and no newlines (LLaVA's "spatial" without "_unpad").
    unpad: bool = True
    # What several images in one conversation get: tiles each, or one padded view each.
    multi_image: Literal["tile", "single_view"] = "tile"

    pads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.candidates() or any(min(grid) < 1 for grid in self.candidates()):
            raise UserError(f"tiling 'anyres': grids must be pairs of at least 1, not {self.grids}")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise UserError(f"tiling 'anyres': max_tiles must be at least 1, not {self.max_tiles}")

    @property
    def is_mosaic(self) -> bool:
        """Whether the tiles' tokens are laid out row by row of the whole picture."""
        return True

    @property
    def unpads(self) -> bool:
        """Whether tokens that saw only padding are left out of the mosaic."""
        return self.unpad

    def candidates(self) -> tuple[Size, ...]:
        """Return the grids (rows, cols) in the order in which ties are decided.

        Raises:
            UserError: the range is not of the form "(1x1),...,(6x6)".
        """
        if not isinstance(self.grids, str):
            return self.grids
        match = _GRID_RANGE.fullmatch(self.grids)
        if match is None:
            raise UserError(
                f"tiling 'anyres': grids {self.grids!r} is not of the form '(1x1),...,(6x6)'"
            )
        col_low, row_low, col_high, row_high = map(int, match.groups())
        # LLaVA-NeXT's mm_utils writes (width x height) with the width outermost.
        columns, rows = range(col_low, col_high + 1), range(row_low, row_high + 1)
        return tuple((row, col) for col in columns for row in rows)

    def plan(self, width: int, height: int, view_size: int, num_images: int = 1) -> ViewPlan:
        """Return the whole image first, then the tiles of the best grid."""
        if num_images > 1 and self.multi_image == "single_view":
            return ViewPlan(0, 0, "first")
        return ViewPlan(*best_fitting_grid((width, height), view_size, self.candidates()), "first")

    def plan_of_grid(self, grid: Size) -> ViewPlan:
        """Return the plan that has this (rows, cols) grid; (0, 0) is the whole image alone."""
        return ViewPlan(*grid, "first")

    def split(
        self, image: Image.Image, view_size: int, mean_color: Color, num_images: int = 1
    ) -> list[Image.Image]:
        """Return the stretched whole (or, alone, the padded whole), then the tiles row by row."""
        plan = self.plan(*image.size, view_size, num_images)
        if plan.grid == (0, 0):
            return PadTiling().split(image, view_size, mean_color)
        canvas_size = (plan.cols * view_size, plan.rows * view_size)
        scaled = stretch(image, fit_inside(image.size, canvas_size))
        canvas = Image.new("RGB", canvas_size, (0, 0, 0))
        left, top = (canvas.width - scaled.width) // 2, (canvas.height - scaled.height) // 2
        canvas.paste(scaled, (left, top))
        whole = stretch(image, (view_size, view_size))
        return [whole, *cut_tiles(canvas, plan.grid, view_size)]


@dataclass(frozen=True, kw_only=True)
class DynamicTiling(Tiling):
    """InternVL's dynamic preprocessing: stretch to the grid of the nearest aspect ratio, cut it.

    640x480 with max_tiles 12 is exactly 4:3, so it becomes 3 rows of 4 tiles and, last, a thumbnail
    of the whole: 13 views. A square image is one tile and has no thumbnail.
    """

    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    # Several images in one conversation share max_tiles (InternVL's fine-tuning data loader).
    share_tiles: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise UserError(
                "tiling 'dynamic': 1 <= min_tiles <= max_tiles must hold, not "
                f"min_tiles={self.min_tiles}, max_tiles={self.max_tiles}"
            )

    def plan(self, width: int, height: int, view_size: int, num_images: int = 1) -> ViewPlan:
        """Return the tiles of the nearest grid, then the thumbnail if there are several."""
        limit = max(1, self.max_tiles // num_images) if self.share_tiles else self.max_tiles
        low = min(self.min_tiles, limit)
        return self.plan_of_grid(nearest_grid((width, height), view_size, low, limit))

    def plan_of_grid(self, grid: Size) -> ViewPlan:
        """Return the plan that has this (rows, cols) grid."""
        return ViewPlan(*grid, "last" if self.thumbnail and grid != (1, 1) else "none")

    def split(
        self, image: Image.Image, view_size: int, mean_color: Color, num_images: int = 1
    ) -> list[Image.Image]:
        """Return the tiles row by row, then the thumbnail if the plan has one."""
        plan = self.plan(*image.size, view_size, num_images)
        canvas = stretch(image, (plan.cols * view_size, plan.rows * view_size))
        views = cut_tiles(canvas, plan.grid, view_size)
        return views if plan.whole == "none" else [*views, stretch(image, (view_size, view_size))]


@dataclass(frozen=True, kw_only=True)
class HdTiling(Tiling):
    """XComposer2-4KHD's HD-N: as large as N tiles allow, padded with white; the whole is first.

    640x480 with max_tiles 9 at 336-pixel views is scaled to 1008x756 and padded to 3 x 3 tiles: ten
    views. Its tokens (`token_layout`) at 12 x 12 a view: 12 rows of the whole, the separator, 36
    rows of 36, each with a newline: 1489. IXC-2.5 has `upscale: 1.5` and 560-pixel views.
    """

    max_tiles: int = 25  # N
    # The longer side grows at most by this, up to whole tiles; None: as far as max_tiles allows.
    upscale: float | None = None

    pads: ClassVar[bool] = True
    pads_whole: ClassVar[bool] = True
    pads_frames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise UserError(f"tiling 'hd': max_tiles must be at least 1, not {self.max_tiles}")
        if self.upscale is not None and self.upscale <= 0:
            raise UserError(f"tiling 'hd': upscale must be above 0, not {self.upscale}")

    @property
    def is_mosaic(self) -> bool:
        """Whether the tiles' tokens are laid out row by row of the whole picture."""
        return True

    @property
    def has_newline(self) -> bool:
        """Whether rows of tokens end in a learned newline, which the model then owns."""
        return True

    @property
    def has_separator(self) -> bool:
        """Whether the whole image's rows end so too, and a learned separator comes after them."""
        return True

    def plan(self, width: int, height: int, view_size: int, num_images: int = 1) -> ViewPlan:
        """Return the whole image first, then the tiles that the scaled image fills."""
        scaled = hd_size((width, height), view_size, self.max_tiles, self.upscale)
        cols, rows = (-(-side // view_size) for side in scaled)
        return ViewPlan(rows, cols, "first")

    def plan_of_grid(self, grid: Size) -> ViewPlan:
        """Return the plan that has this (rows, cols) grid."""
        return ViewPlan(*grid, "first")

    def split(
        self, image: Image.Image, view_size: int, mean_color: Color, num_images: int = 1
    ) -> list[Image.Image]:
        """Return the whole padded canvas made small, then its tiles row by row."""
        plan = self.plan(*image.size, view_size)
        scaled = stretch_along(image, hd_size(image.size, view_size, self.max_tiles, self.upscale))
        canvas = Image.new("RGB", (plan.cols * view_size, plan.rows * view_size), "white")
        left, top = (canvas.width - scaled.width) // 2, (canvas.height - scaled.height) // 2
        canvas.paste(scaled, (left, top))
        return [sample(canvas, (view_size, view_size)), *cut_tiles(canvas, plan.grid, view_size)]


def plan_of(tiling: Tiling, grid: Size) -> ViewPlan:
    """Return the plan of a row of `tile_grids`: (0, n) is a video of n frames, else an image."""
    if is_video(grid):
        return ViewPlan(0, 0, frames=grid[1])
    return tiling.plan_of_grid(grid)


def is_video(grid: Size) -> bool:
    """Return whether a row of `tile_grids` is a video's."""
    return grid[0] == 0 and grid[1] > 0


TILINGS: dict[str, type[Tiling]] = {
    "resize": ResizeTiling,
    "pad": PadTiling,
    "anyres": AnyresTiling,
    "dynamic": DynamicTiling,
    "hd": HdTiling,
}


def build_tiling(config: Mapping[str, Any]) -> Tiling:
    """Return the tiling of a config dict such as `{"type": "dynamic", "max_tiles": 6}`.

    Raises:
        UserError: unknown type, unknown field, or a value of the wrong type or range.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("type"), str):
        raise UserError(
            f"tiling must be a mapping with a 'type', such as {{type: resize}}, not {config!r}; "
            f"choose a type from {', '.join(sorted(TILINGS))}"
        )
    values = {name: value for name, value in config.items() if name != "type"}
    tiling_class = lookup("tiling", config["type"], TILINGS)
    return config_from_mapping(tiling_class, values, f"tiling {config['type']!r}")


def tiling_config(tiling: Tiling) -> dict[str, Any]:
    """Return the dict that `build_tiling` turns into this tiling again, with every default."""
    name = next(name for name, kind in TILINGS.items() if kind is type(tiling))
    return {"type": name, **asdict(tiling)}
