"""Does the renderer paint what the scene says, and know what can be seen?"""

import numpy as np
import pytest

from data_recipes.scenes.layout import Difficulty, SceneBatch, sample_scenes
from data_recipes.scenes.render import BOX_PALETTE, PALETTE, render
from data_recipes.scenes.vocabulary import COLOR_NAMES, SHAPES


def one_scene(objects, solid=False):
    """Return a batch of one scene; objects are dicts of SceneBatch's per-slot fields."""

    def column(name, default):
        return np.array([[thing.get(name, default) for thing in objects]])

    return SceneBatch(
        solid=np.array([solid]),
        exists=np.ones((1, len(objects)), dtype=bool),
        shape=column("shape", SHAPES.index("square")),
        color=column("color", 0),
        x=column("x", 0.5).astype(float),
        y=column("y", 0.5).astype(float),
        z=column("z", 1.0).astype(float),
        radius=column("radius", 0.2).astype(float),
        box=column("box", 0),
        target=np.zeros(1, dtype=int),
    )


def paint(scene, size=64):
    return render(scene, size, np.random.default_rng(0), noise=0.0)


@pytest.mark.parametrize("color", range(len(COLOR_NAMES)))
@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
def test_a_flat_object_has_its_colour_at_its_centre(shape, color):
    scene = one_scene([{"shape": SHAPES.index(shape), "color": color, "x": 0.3, "y": 0.7}])
    picture = paint(scene)[0][0]
    assert np.abs(picture[int(0.7 * 64), int(0.3 * 64)] / 255 - PALETTE[color]).max() < 0.02


def test_every_shape_looks_different():
    pictures = [
        paint(one_scene([{"shape": i, "radius": 0.3}]))[0][0].astype(int)
        for i in range(len(SHAPES))
    ]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            assert np.abs(first - second).mean() > 1


def test_visible_share_is_exact_for_squares_that_overlap():
    near = {"x": 0.5, "y": 0.5, "z": 1.0}
    far = {"x": 0.5 + 0.82 * 0.2, "y": 0.5, "z": 2.0}  # moved by half its side (2 x 0.82 x radius)
    visible = paint(one_scene([near, far]), size=200)[1][0]
    assert visible[0] == pytest.approx(1.0)
    assert visible[1] == pytest.approx(0.5, abs=0.01)


def test_the_nearer_object_hides_the_farther_one():
    near = {"color": 0, "z": 1.0}
    far = {"color": 1, "z": 2.0}
    for objects in ([near, far], [far, near]):
        picture = paint(one_scene(objects))[0][0]
        assert np.abs(picture[32, 32] / 255 - PALETTE[0]).max() < 0.02


@pytest.mark.parametrize("box", [1, 2, 3])
def test_a_box_frames_its_object_in_its_colour(box):
    plain = paint(one_scene([{"radius": 0.15}]))[0][0]
    boxed = paint(one_scene([{"radius": 0.15, "box": box}]))[0][0]
    changed = (plain != boxed).any(-1)
    rows, columns = np.nonzero(changed)
    assert np.allclose(boxed[changed] / 255, BOX_PALETTE[box], atol=0.01)
    assert rows.min() < 32 - 0.15 * 64 and rows.max() > 32 + 0.14 * 64
    assert not changed[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()].any()


def test_chunks_do_not_change_the_picture():
    scenes = sample_scenes(np.random.default_rng(0), 130, Difficulty())
    whole, _ = render(scenes, 32, np.random.default_rng(1), 0.0)
    first, _ = render(scenes.select(np.arange(64)), 32, np.random.default_rng(1), 0.0)
    assert np.array_equal(whole[:64], first)


def test_haze_and_size_tell_depth():
    pictures = [
        paint(one_scene([{"shape": SHAPES.index("cube"), "z": z, "radius": 0.17 / z}], solid=True))
        for z in (1.0, 2.2)
    ]
    near, far = (picture[0][0, 32, 32].astype(float) for picture in pictures)
    sky = np.array([0.62, 0.68, 0.76]) * 255
    assert np.abs(far - sky).sum() < np.abs(near - sky).sum()
