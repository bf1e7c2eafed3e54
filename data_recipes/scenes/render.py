"""What does a scene look like? Painter's algorithm over signed distances, many scenes at once.

Shapes: S scenes, P pixels per side, K slots. Objects are painted from far to near; an edge is one
pixel soft, which the signed distance gives for free. Besides the pictures the renderer returns how
much of every object is visible, exactly, because it knows every layer's opacity.
"""

import numpy as np

from data_recipes.scenes.layout import FARTHEST, HORIZON, NEAREST, SceneBatch, ground_height
from data_recipes.scenes.vocabulary import BOX_RGB, COLORS, SHAPES

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
BOX_PALETTE = np.array(BOX_RGB, dtype=np.float32)
SKY = np.array([0.62, 0.68, 0.76], dtype=np.float32)
GROUND_FAR = np.array([0.55, 0.57, 0.56], dtype=np.float32)
GROUND_NEAR = np.array([0.30, 0.33, 0.32], dtype=np.float32)
HAZE = 0.35  # share of sky colour in the farthest object
CHUNK = 64  # scenes painted together: keeps the working set in the CPU's cache
LIGHT = (-0.5, -0.6, 0.62)


def render(
    scenes: SceneBatch, size: int, rng: np.random.Generator, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Paint the scenes.

    Returns:
        pictures (S, P, P, 3) uint8 and the visible share (S, K) of every object, boxes not counted
        as hiding anything; 0 for slots that do not exist.
    """
    pictures = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    visible = np.zeros(scenes.x.shape, dtype=np.float32)
    for start in range(0, len(scenes), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(scenes)))
        canvas, visible[rows] = _paint(scenes.select(rows), size, rng)
        canvas += noise * rng.standard_normal(canvas.shape, dtype=np.float32)
        pictures[rows] = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return pictures, visible


def _paint(
    scenes: SceneBatch, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    num, slots = scenes.x.shape
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    canvas = _background(scenes.solid, grid, rng)
    for k in range(slots):
        rows = np.flatnonzero(scenes.exists[:, k] & scenes.solid)
        _paint_shadow(canvas, scenes, rows, k, grid)

    order = np.argsort(-scenes.z, axis=1)  # far to near
    layers = np.zeros((slots, num, size, size), dtype=np.float32)  # opacity, in painting order
    for step in range(slots):
        slot = order[:, step]
        for shape, name in enumerate(SHAPES):
            rows = np.flatnonzero(
                scenes.exists[np.arange(num), slot] & (scenes.shape[np.arange(num), slot] == shape)
            )
            if len(rows):
                layers[step, rows] = _paint_object(canvas, scenes, rows, slot[rows], name, grid)

    remaining = np.ones((num, size, size), dtype=np.float32)
    visible = np.zeros((num, slots), dtype=np.float32)
    for step in reversed(range(slots)):
        seen = (layers[step] * remaining).sum((1, 2))
        whole = layers[step].sum((1, 2))
        visible[np.arange(num), order[:, step]] = seen / np.maximum(whole, 1e-6)
        remaining *= 1 - layers[step]
    _draw_boxes(canvas, scenes, size)
    return canvas, visible


def _background(solid: np.ndarray, grid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (S, P, P, 3): one dark tone for flat scenes, sky and hazy ground for solid ones."""
    num, size = len(solid), len(grid)
    tone = rng.uniform(0.10, 0.35, (num, 1, 1, 1)).astype(np.float32)
    tint = rng.uniform(-0.04, 0.04, (num, 1, 1, 3)).astype(np.float32)
    flat = np.broadcast_to(tone + tint, (num, size, size, 3))
    nearness = np.clip((grid - HORIZON) / (1 - HORIZON), 0, 1)[:, None, None]
    column = GROUND_FAR + (GROUND_NEAR - GROUND_FAR) * nearness
    column = np.where((grid < HORIZON)[:, None, None], SKY, column)
    ground = column[None] + tint + (tone - 0.22) * 0.5
    ground = np.broadcast_to(ground, (num, size, size, 3))
    return np.where(solid[:, None, None, None], ground, flat).astype(np.float32)


def _paint_shadow(
    canvas: np.ndarray, scenes: SceneBatch, rows: np.ndarray, k: int, grid: np.ndarray
) -> None:
    """Darken the ground below object k: a soft ellipse where the object would touch down."""
    radius = scenes.radius[rows, k, None, None].astype(np.float32)
    u = (grid[None, None, :] - scenes.x[rows, k, None, None].astype(np.float32)) / radius
    foot = ground_height(scenes.z[rows, k]).astype(np.float32)[:, None, None]
    v = (grid[None, :, None] - foot) / (0.3 * radius)
    canvas[rows] *= (1 - 0.35 * np.clip(1.3 - u * u - v * v, 0, 1))[..., None]


def _paint_object(
    canvas: np.ndarray,
    scenes: SceneBatch,
    rows: np.ndarray,
    slot: np.ndarray,
    name: str,
    grid: np.ndarray,
) -> np.ndarray:
    """Paint one slot of the given scenes, all of one shape; return its opacity (R, P, P)."""
    size = len(grid)
    radius = scenes.radius[rows, slot].astype(np.float32)[:, None, None]
    u = (grid[None, None, :] - scenes.x[rows, slot].astype(np.float32)[:, None, None]) / radius
    v = (grid[None, :, None] - scenes.y[rows, slot].astype(np.float32)[:, None, None]) / radius
    distance, shade = SHAPE_FUNCTIONS[name](u, v)
    alpha = np.clip(0.5 - distance * radius * size, 0, 1)
    rgb = PALETTE[scenes.color[rows, slot]][:, None, None, :] * shade[..., None]
    depth = np.where(scenes.solid[rows], (scenes.z[rows, slot] - NEAREST) / (FARTHEST - NEAREST), 0)
    haze = (HAZE * depth).astype(np.float32)[:, None, None, None]
    rgb = rgb * (1 - haze) + SKY * haze
    canvas[rows] += alpha[..., None] * (rgb - canvas[rows])
    return alpha


def _draw_boxes(canvas: np.ndarray, scenes: SceneBatch, size: int) -> None:
    """Draw the one-pixel (at 64 px) frames of boxed objects, two pixels off the object."""
    thickness = max(1, round(size / 64))
    for row, slot in zip(*np.nonzero((scenes.box > 0) & scenes.exists), strict=True):
        reach = float(scenes.radius[row, slot]) * size + 1.5 * thickness
        x, y = float(scenes.x[row, slot]) * size, float(scenes.y[row, slot]) * size
        left, right = max(round(x - reach), 0), min(round(x + reach), size)
        top, bottom = max(round(y - reach), 0), min(round(y + reach), size)
        rgb = BOX_PALETTE[scenes.box[row, slot]]
        canvas[row, top : top + thickness, left:right] = rgb
        canvas[row, bottom - thickness : bottom, left:right] = rgb
        canvas[row, top:bottom, left : left + thickness] = rgb
        canvas[row, top:bottom, right - thickness : right] = rgb


# Each shape takes coordinates relative to the centre in units of the radius (v downwards) and
# returns the signed distance to its outline (negative inside, same units) and a brightness.


def _ellipse(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return an estimate of the distance that is exact on the outline and monotone across it."""
    return (np.sqrt((u / a) ** 2 + (v / b) ** 2) - 1) * min(a, b)


def _flat(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return distance, np.ones_like(distance)


def _circle(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _flat(np.sqrt(u * u + v * v) - 0.95)


def _square(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _flat(np.maximum(np.abs(u), np.abs(v)) - 0.82)


def _triangle(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _flat(np.maximum(v - 0.8, 0.894 * np.abs(u) - 0.447 * (v + 1)))


def _cross(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.abs(u), np.abs(v)
    return _flat(np.minimum(np.maximum(u - 0.3, v - 0.95), np.maximum(u - 0.95, v - 0.3)))


def _ball(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    square = u * u + v * v
    normal = np.sqrt(np.clip(1 - square, 0, 1))
    lit = np.clip(u * LIGHT[0] + v * LIGHT[1] + normal * LIGHT[2], 0, 1)
    return np.sqrt(square) - 0.97, 0.35 + 0.75 * lit


def _cube(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oblique view: front face, a lighter top and a darker right side."""
    sides = np.maximum(np.maximum(-u - 0.85, u - 0.95), np.maximum(v - 0.95, -v - 0.85))
    corners = np.maximum(-u - v - 1.3, u + v - 1.5) * 0.707
    front = (u < 0.55) & (v > -0.45)
    top = ~front & (u - 0.55 < -(v + 0.45))
    return np.maximum(sides, corners), np.where(front, 0.8, np.where(top, 1.1, 0.5))


def _cone(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mantle = np.maximum(v - 0.7, 0.894 * np.abs(u) - 0.447 * (v + 1))
    base = _ellipse(u, v - 0.7, 0.85, 0.25)
    width = np.maximum(0.5 * (v + 1), 0.1)
    return np.minimum(mantle, base), 0.75 - 0.4 * np.clip(u / width, -1, 1)


def _cylinder(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    body = np.maximum(np.abs(u) - 0.62, np.abs(v) - 0.68)
    lid = _ellipse(u, v + 0.68, 0.62, 0.25)
    base = _ellipse(u, v - 0.68, 0.62, 0.25)
    shade = 0.75 - 0.35 * np.clip(u / 0.62, -1, 1)
    return np.minimum(np.minimum(body, lid), base), np.where(lid < 0, 1.15, shade)


SHAPE_FUNCTIONS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "cylinder": _cylinder,
}
