"""Where do the objects of a scene stand? Sampling of many scenes at once, with exact geometry.

Shapes: S scenes, K object slots. Pictures are square; every length in pixels scales with their
side, so one seed gives the same scenes at any size. In world units the nearest object stands at
depth 1.

A solid scene is seen by a pinhole camera with focal length `FOCAL` (in picture sides), horizon at
`HORIZON` of the height, `CAMERA_HEIGHT` above the ground plane. A flat scene has no depth.
"""

from dataclasses import dataclass, fields

import numpy as np

from data_recipes.scenes.vocabulary import (
    COLOR_NAMES,
    FLAT_SHAPES,
    NUM_CELLS,
    NUM_DEPTH_BINS,
    NUM_DISTANCE_BINS,
    SHAPES,
)
from vlm.errors import UserError

FOCAL = 0.70
HORIZON = 0.30
CAMERA_HEIGHT = 0.86
NEAREST, FARTHEST = 1.0, 2.2
OBJECT_RADIUS = 0.245  # world units; 11 px of 64 at depth 1, 5 px at depth 2.2
DISTANCE_RANGE = (0.3, 2.4)  # world units covered by the distance bins
PLACEMENT_TRIES = 16
MOST_COUNTED = 6
# Floating objects have their centres between these heights, whatever their depth: where one hovers
# must say nothing about how far away it is.
HOVER_RANGE = (OBJECT_RADIUS * FOCAL / NEAREST, 0.5)
KNOB_RANGES = {
    "solid_share": (0, 1),
    "floating_share": (0, 1),
    "size_jitter": (0, 0.3),
    "spacing": (0, 1.5),
    "noise": (0, 0.5),
    "depth_ratio": (1, 2),
    "distance_ratio": (1, 2),
    "relation_cells": (0, 4),
}


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """The knobs of a scene; the defaults are the quickstart's.

    Attributes:
        min_objects: fewest objects asked for in a scene.
        max_objects: K, most objects in a scene.
        solid_share: share of scenes with depth.
        floating_share: share of solid objects that hover above the ground. At 1.0 the height of
            the centres says nothing about depth.
        size_jitter: relative spread of object sizes; blurs size as a cue for depth.
        spacing: least centre distance of two objects, in units of the sum of their radii. Below 1
            objects may hide parts of each other.
        noise: standard deviation of the pixel noise (0..1 scale).
        depth_ratio: least ratio of two depths that a question may compare.
        distance_ratio: least ratio of two distances that a question may compare.
        relation_cells: least offset, in grid cells, along the axis that a question asks about.
    """

    min_objects: int = 4
    max_objects: int = 7
    solid_share: float = 0.8
    floating_share: float = 0.6
    size_jitter: float = 0.05
    spacing: float = 0.8
    noise: float = 0.02
    depth_ratio: float = 1.25
    distance_ratio: float = 2.0
    relation_cells: float = 1.0

    def __post_init__(self) -> None:
        """Refuse knobs that leave nothing to draw or to ask."""
        if not 1 <= self.min_objects <= self.max_objects:
            raise UserError(
                f"scenes: min_objects {self.min_objects} and max_objects {self.max_objects} must "
                "be at least 1 and in this order"
            )
        if self.max_objects < MOST_COUNTED:
            raise UserError(
                f"scenes: max_objects must be {MOST_COUNTED} or more, the largest number that "
                f"counting asks for, not {self.max_objects}"
            )
        for name, (low, high) in KNOB_RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # false for nan, too
                raise UserError(f"scenes: {name} must be from {low} to {high}, not {value}")


@dataclass
class SceneBatch:
    """S scenes as arrays; x, y and radius are shares of the picture's side.

    `target` is the category whose number of members was drawn uniformly (for counting): an index
    into SHAPES, or len(SHAPES) + index into COLOR_NAMES.
    """

    solid: np.ndarray  # (S,) bool
    exists: np.ndarray  # (S, K) bool
    shape: np.ndarray  # (S, K) index into SHAPES
    color: np.ndarray  # (S, K) index into COLOR_NAMES
    x: np.ndarray  # (S, K) centre, to the right
    y: np.ndarray  # (S, K) centre, downwards
    z: np.ndarray  # (S, K) depth in world units; 1 in flat scenes
    radius: np.ndarray  # (S, K)
    box: np.ndarray  # (S, K) index into BOX_NAMES
    target: np.ndarray  # (S,)

    def __len__(self) -> int:
        return len(self.solid)

    def select(self, rows: np.ndarray) -> "SceneBatch":
        """Return the scenes at `rows` (indices or a mask)."""
        return SceneBatch(**{f.name: getattr(self, f.name)[rows].copy() for f in fields(self)})

    @property
    def cell_x(self) -> np.ndarray:
        """(S, K) column of the object's centre in the 8 x 8 grid."""
        return np.minimum((self.x * NUM_CELLS).astype(int), NUM_CELLS - 1)

    @property
    def cell_y(self) -> np.ndarray:
        """(S, K) row of the object's centre in the 8 x 8 grid."""
        return np.minimum((self.y * NUM_CELLS).astype(int), NUM_CELLS - 1)

    @property
    def depth_bin(self) -> np.ndarray:
        """(S, K) depth in bins of equal ratio, 0 nearest."""
        return _ratio_bin(self.z, NEAREST, FARTHEST, NUM_DEPTH_BINS)

    def distance(self, rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return the world distance between the centres of two slots, one pair a row."""
        points = []
        for slot in (first, second):
            z = self.z[rows, slot]
            x = (self.x[rows, slot] - 0.5) * z / FOCAL
            y = (self.y[rows, slot] - HORIZON) * z / FOCAL
            points.append(np.stack([x, y, z], axis=-1))
        return np.linalg.norm(points[0] - points[1], axis=-1)


def distance_bin(distance: np.ndarray) -> np.ndarray:
    """Return the bin (0 closest) of a world distance."""
    return _ratio_bin(distance, *DISTANCE_RANGE, NUM_DISTANCE_BINS)


def _ratio_bin(value: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    position = np.log(value / low) / np.log(high / low)
    return np.clip((position * bins).astype(int), 0, bins - 1)


def sample_scenes(rng: np.random.Generator, num: int, difficulty: Difficulty) -> SceneBatch:
    """Draw `num` scenes. Slots that found no free place are marked as not existing."""
    slots = difficulty.max_objects
    solid = rng.random(num) < difficulty.solid_share
    shape, color, target, wanted = _sample_categories(rng, num, slots, solid, difficulty)
    z = np.where(solid[:, None], NEAREST * (FARTHEST / NEAREST) ** rng.random((num, slots)), 1.0)
    jitter = 1 + difficulty.size_jitter * rng.standard_normal((num, slots)).clip(-2, 2)
    flat_radius = OBJECT_RADIUS * FOCAL * rng.uniform(0.5, 1.0, (num, slots))
    radius = np.where(solid[:, None], OBJECT_RADIUS * FOCAL / z, flat_radius) * jitter
    floating = rng.random((num, slots)) < difficulty.floating_share
    x, y, placed = _place(rng, solid, floating, z, radius, wanted, difficulty.spacing)
    return SceneBatch(
        solid=solid,
        exists=placed,
        shape=shape,
        color=color,
        x=x,
        y=y,
        z=z,
        radius=radius,
        box=np.zeros((num, slots), dtype=int),
        target=target,
    )


def _sample_categories(
    rng: np.random.Generator, num: int, slots: int, solid: np.ndarray, difficulty: Difficulty
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return shape, colour (S, K), target category (S,) and wanted slots (S, K).

    The number of members of the target category is uniform, so that no count is likelier than
    another before the picture is seen.
    """
    per_kind = len(FLAT_SHAPES)
    first_shape = np.where(solid, per_kind, 0)
    members = rng.integers(0, MOST_COUNTED + 1, num)
    others = rng.integers(0, 4, num)
    total = np.clip(members + others, difficulty.min_objects, slots)
    wanted = np.arange(slots) < total[:, None]
    is_member = np.arange(slots) < members[:, None]
    by_shape = rng.random(num) < 0.5

    target_shape = rng.integers(0, per_kind, num)
    target_color = rng.integers(0, len(COLOR_NAMES), num)
    shape = rng.integers(0, per_kind, (num, slots))
    color = rng.integers(0, len(COLOR_NAMES), (num, slots))
    other_shape = (target_shape[:, None] + rng.integers(1, per_kind, (num, slots))) % per_kind
    other_color = (target_color[:, None] + rng.integers(1, len(COLOR_NAMES), (num, slots))) % len(
        COLOR_NAMES
    )
    shape = np.where(
        by_shape[:, None], np.where(is_member, target_shape[:, None], other_shape), shape
    )
    color = np.where(
        by_shape[:, None], color, np.where(is_member, target_color[:, None], other_color)
    )
    # Which slot is placed first must not depend on the category.
    order = np.argsort(rng.random((num, slots)) + 2.0 * ~wanted, axis=1)
    shape = np.take_along_axis(shape, order, 1) + first_shape[:, None]
    color = np.take_along_axis(color, order, 1)
    target = np.where(by_shape, target_shape + first_shape, len(SHAPES) + target_color)
    return shape, color, target, wanted


def _place(
    rng: np.random.Generator,
    solid: np.ndarray,
    floating: np.ndarray,
    z: np.ndarray,
    radius: np.ndarray,
    wanted: np.ndarray,
    spacing: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place slot after slot at the first of several random spots that keeps its distance.

    All centres also lie in different cells of the 8 x 8 grid, so that a cell names one object.
    """
    num, slots = radius.shape
    x, y = np.full((num, slots), -9.0), np.full((num, slots), -9.0)
    placed = np.zeros((num, slots), dtype=bool)
    rows = np.arange(num)
    for k in range(slots):
        r = radius[:, k, None]
        try_x = rng.uniform(r, 1 - r, (num, PLACEMENT_TRIES))
        free_y = rng.uniform(r, 1 - r, (num, PLACEMENT_TRIES))
        ground_y = ground_height(z[:, k, None]) - r
        hover_y = rng.uniform(*HOVER_RANGE, (num, PLACEMENT_TRIES))
        solid_y = np.where(floating[:, k, None], hover_y, ground_y)
        try_y = np.where(solid[:, None], solid_y, free_y)
        dx = try_x[:, :, None] - x[:, None, :k]
        dy = try_y[:, :, None] - y[:, None, :k]
        reach = spacing * (radius[:, k, None, None] + radius[:, None, :k])
        same_cell = (
            np.floor(try_x * NUM_CELLS)[..., None] == np.floor(x[:, None, :k] * NUM_CELLS)
        ) & (np.floor(try_y * NUM_CELLS)[..., None] == np.floor(y[:, None, :k] * NUM_CELLS))
        free = ((dx**2 + dy**2 > reach**2) & ~same_cell).all(axis=2)
        chosen = free.argmax(axis=1)
        ok = free.any(axis=1) & wanted[:, k]
        placed[:, k] = ok
        x[ok, k] = try_x[rows[ok], chosen[ok]]
        y[ok, k] = try_y[rows[ok], chosen[ok]]
    return x, y, placed


def ground_height(z: np.ndarray) -> np.ndarray:
    """Return where the ground at depth `z` appears, as a share of the picture's height."""
    return HORIZON + FOCAL * CAMERA_HEIGHT / z
