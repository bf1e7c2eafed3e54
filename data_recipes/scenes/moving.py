"""What happens in a moving scene? One object moves, others appear; all of it known exactly.

Shapes: S clips, K object slots, F frames, P pixels per side. Slot 0 moves all the time, at an even
pace; the next ones stand still; the last ones appear, each at a frame of its own.

The first frame says nothing about what follows: all objects in it stand where each would have room
to move in all four directions, placed by one rule, and how many they are is drawn apart from how
many appear. They may pass before or behind each other; what appears keeps off the mover's path.
"""

from dataclasses import dataclass, fields

import numpy as np

from data_recipes.scenes.layout import FARTHEST, FOCAL, OBJECT_RADIUS, SceneBatch
from data_recipes.scenes.render import render
from data_recipes.scenes.vocabulary import COLOR_NAMES, FLAT_SHAPES

NUM_FRAMES = 12
FRAMES_PER_SECOND = 6
DIRECTIONS = ("left", "right", "above", "below")  # where it ends, seen from its beginning
STEPS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], dtype=np.float64)  # x to the right, y down
TRAVEL = 0.22  # share of the picture's side: nearly two cells of eight
START = (0.28, 0.72)  # where the centres of the first frame's objects are, on both axes
NEAREST_HERE = 1.5  # objects are small enough to leave room for seven
STANDING = (2, 3)  # objects that are there from the beginning, beside the mover
MOST_APPEARING = 3
APPEARING_AT = (2, 5, 8)  # frames; of 8 evenly spread frames of 12 each shows one more
SLOTS = 1 + STANDING[1] + MOST_APPEARING
SPACING = 0.9  # least distance of centres, in units of the sum of the radii
TRIES = 200
SOLID_SHARE = 0.5


@dataclass
class MovingBatch:
    """S clips: the scenes as they begin, with all objects that ever exist, and what happens."""

    scenes: SceneBatch
    direction: np.ndarray  # (S,) index into DIRECTIONS
    appears: np.ndarray  # (S, K) frame at which an object is first there; 0: from the beginning

    def __len__(self) -> int:
        return len(self.direction)

    def at(self, frame: int) -> SceneBatch:
        """Return the scenes as they are at one frame."""
        scenes = SceneBatch(**{f.name: getattr(self.scenes, f.name) for f in fields(SceneBatch)})
        moved = TRAVEL * frame / (NUM_FRAMES - 1) * STEPS[self.direction]
        scenes.x, scenes.y = scenes.x.copy(), scenes.y.copy()
        scenes.x[:, 0] += moved[:, 0]
        scenes.y[:, 0] += moved[:, 1]
        scenes.exists = scenes.exists & (self.appears <= frame)
        return scenes

    def slots(self, row: int, appearing: bool) -> list[int]:
        """Return the slots of a clip that are there at first, or that appear, in that order."""
        found = [int(k) for k in np.flatnonzero(self.scenes.exists[row])]
        if not appearing:
            return [k for k in found if self.appears[row, k] == 0]
        return sorted(
            (k for k in found if self.appears[row, k]), key=lambda k: self.appears[row, k]
        )


def sample_moving(
    rng: np.random.Generator, direction: np.ndarray, appearing: np.ndarray
) -> MovingBatch:
    """Draw clips.

    Args:
        rng: decides everything else.
        direction: (S,) where the mover goes.
        appearing: (S,) how many objects appear.
    """
    num = len(direction)
    solid = rng.random(num) < SOLID_SHARE
    values = {
        name: np.zeros((num, SLOTS))
        for name in ("exists", "shape", "color", "x", "y", "z", "radius", "box")
    }
    appears = np.zeros((num, SLOTS), dtype=int)
    for row in range(num):
        standing = int(rng.integers(STANDING[0], STANDING[1] + 1))
        used = [
            0,
            *range(1, 1 + standing),
            *range(1 + STANDING[1], 1 + STANDING[1] + appearing[row]),
        ]
        z = NEAREST_HERE * (FARTHEST / NEAREST_HERE) ** rng.random(SLOTS)
        radius = OBJECT_RADIUS * FOCAL / z
        x, y = _place(rng, radius, standing, used, STEPS[direction[row]])
        kinds = rng.permutation(len(COLOR_NAMES) * len(FLAT_SHAPES))[:SLOTS]
        values["exists"][row, used] = 1
        values["color"][row] = kinds % len(COLOR_NAMES)
        values["shape"][row] = kinds // len(COLOR_NAMES) + len(FLAT_SHAPES) * solid[row]
        values["x"][row], values["y"][row] = x, y
        values["z"][row] = z  # in flat scenes, only who is painted over whom
        values["radius"][row] = radius
        times = rng.permutation(APPEARING_AT)[: appearing[row]]
        appears[row, used[1 + standing :]] = times
    whole = {name: values[name].astype(int) for name in ("shape", "color", "box")}
    scenes = SceneBatch(
        solid=solid,
        exists=values["exists"].astype(bool),
        **whole,
        **{name: values[name] for name in ("x", "y", "z", "radius")},
        target=np.zeros(num, dtype=int),
    )
    return MovingBatch(scenes, np.asarray(direction), appears)


def _place(
    rng: np.random.Generator, radius: np.ndarray, standing: int, used: list[int], step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return centres (K,) of a clip's objects, apart from each other.

    Args:
        rng: decides them.
        radius: (K,) of each.
        standing: how many of the first frame's do not move.
        used: slots, the mover first, then those that stand, then those that appear.
        step: (2,) where the mover goes.
    """
    moments = np.linspace(0, TRAVEL, NUM_FRAMES)[:, None]
    while True:
        x, y = np.full(SLOTS, -9.0), np.full(SLOTS, -9.0)
        for number, k in enumerate(used):
            appears = number > standing
            low, high = (radius[k], 1 - radius[k]) if appears else START
            for _ in range(TRIES):
                at = rng.uniform(low, high, 2)
                apart = np.hypot(at[0] - x, at[1] - y) > SPACING * (radius[k] + radius)
                path = np.array([x[0], y[0]]) + moments * step
                off = np.hypot(*(at - path).T) > SPACING * (radius[k] + radius[0])
                if apart.all() and (off.all() or not appears):
                    x[k], y[k] = at
                    break
            else:
                break  # no room for it: all of the clip is drawn anew
        else:
            return x, y


def render_clips(batch: MovingBatch, size: int, seed: int, noise: float) -> np.ndarray:
    """Return the clips' pictures (S, F, P, P, 3), uint8; background and noise stand still."""
    frames = [
        render(batch.at(frame), size, np.random.default_rng(seed), noise)[0]
        for frame in range(NUM_FRAMES)
    ]
    return np.stack(frames, axis=1)
