"""Do sampled scenes keep the geometry they promise?"""

import numpy as np
import pytest

from data_recipes.scenes.layout import (
    FARTHEST,
    NEAREST,
    Difficulty,
    distance_bin,
    ground_height,
    sample_scenes,
)


def scenes(seed=0, num=300, **knobs):
    return sample_scenes(np.random.default_rng(seed), num, Difficulty(**knobs))


def test_one_seed_gives_the_same_scenes_and_another_seed_others():
    assert np.array_equal(scenes(3).x, scenes(3).x)
    assert not np.array_equal(scenes(3).x, scenes(4).x)


def test_objects_lie_inside_the_picture():
    batch = scenes()
    there = batch.exists
    for centre in (batch.x[there], batch.y[there]):
        assert (centre - batch.radius[there] >= -1e-9).all()
        assert (centre + batch.radius[there] <= 1 + 1e-9).all()


def test_no_two_objects_share_a_cell_or_come_closer_than_the_spacing():
    batch = scenes(spacing=0.9)
    for row in range(len(batch)):
        slots = np.flatnonzero(batch.exists[row])
        cells = {(batch.cell_x[row, k], batch.cell_y[row, k]) for k in slots}
        assert len(cells) == len(slots)
        for i in slots:
            for j in slots[slots > i]:
                gap = np.hypot(batch.x[row, i] - batch.x[row, j], batch.y[row, i] - batch.y[row, j])
                assert gap > 0.9 * (batch.radius[row, i] + batch.radius[row, j]) - 1e-9


def test_objects_that_do_not_float_stand_on_the_ground():
    batch = scenes(solid_share=1.0, floating_share=0.0)
    foot = batch.y + batch.radius
    assert np.allclose(foot[batch.exists], ground_height(batch.z)[batch.exists])


def test_floating_objects_tell_nothing_about_depth_by_their_height():
    standing, floating = (
        scenes(num=4000, solid_share=1.0, floating_share=share) for share in (0.0, 1.0)
    )
    correlation = [np.corrcoef(b.z[b.exists], b.y[b.exists])[0, 1] for b in (standing, floating)]
    assert correlation[0] < -0.9
    assert abs(correlation[1]) < 0.05


def test_nearer_objects_look_larger_and_flat_scenes_have_no_depth():
    batch = scenes(size_jitter=0.0)
    solid = batch.solid[:, None] & batch.exists
    assert np.allclose((batch.radius * batch.z)[solid], (batch.radius * batch.z)[solid][0])
    assert (batch.z[~batch.solid] == 1).all()


def test_depth_bins_are_ordered_and_cover_the_range():
    batch = scenes(num=2000, solid_share=1.0)
    z, bins = batch.z[batch.exists], batch.depth_bin[batch.exists]
    order = np.argsort(z)
    assert (np.diff(bins[order]) >= 0).all()
    assert set(bins) == set(range(8))
    assert z.min() >= NEAREST and z.max() <= FARTHEST


@pytest.mark.parametrize(("distance", "expected"), [(0.01, 0), (0.3, 0), (2.39, 9), (50.0, 9)])
def test_distance_bins_hold_every_distance(distance, expected):
    assert distance_bin(np.array(distance)) == expected


def test_world_distance_of_two_objects_is_euclidean():
    batch = scenes(solid_share=1.0)
    batch.z[0, :2] = 1.0, 2.0
    batch.x[0, :2] = 0.5, 0.5
    batch.y[0, :2] = 0.3, 0.3  # both on the camera's axis
    gap = batch.distance(np.array([0]), np.array([0]), np.array([1]))
    assert gap == pytest.approx([1.0])
