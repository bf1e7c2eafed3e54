"""Does a picture get its own features, the same ones in whatever company it is encoded?"""

import pytest
import torch

from data_recipes.feature_store import Picture
from data_recipes.pictures import Views
from train.features.fill import encoded
from train.features.key import (
    VIEWS_PER_PASS,
    EncoderRun,
    describe_features,
    hash_weights,
    key_of,
    measure,
)

COUNTS = [1, 5, 70, 1, 32, 3, 31, 64, 2]


@pytest.fixture
def run(make_vision_encoder):
    return EncoderRun(make_vision_encoder().eval(), torch.device("cpu"), None)


def item(seed, views):
    torch.manual_seed(seed)
    pixels = torch.randn(views, 3, 32, 32)
    return Views(Picture(bytes([seed]) * 16, (1, 1)), b"", (1, views), pixels)


def test_every_picture_gets_its_own_maps_in_order(run, monkeypatch):
    sizes = []
    encode = EncoderRun.encode
    monkeypatch.setattr(
        EncoderRun, "encode", lambda self, views: sizes.append(len(views)) or encode(self, views)
    )
    items = [item(seed, views) for seed, views in enumerate(COUNTS)]
    found = list(encoded(items, run))
    assert [each for each, _ in found] == items
    for each, maps in found:
        with torch.no_grad():
            expected = run.tower(each.pixel_values)
        assert [len(m) for m in maps] == [len(m) for m in expected]
        torch.testing.assert_close(maps, list(expected), rtol=1e-5, atol=1e-6)
    assert set(sizes) == {VIEWS_PER_PASS}
    assert len(sizes) == -(-sum(COUNTS) // VIEWS_PER_PASS)
    assert list(encoded([], run)) == []


def test_company_changes_no_bit(run):
    wanted, others = item(0, 2), [item(seed, 3) for seed in range(1, 20)]
    for before in (0, 4, 13):
        found = dict(
            (each.picture, maps) for each, maps in encoded([*others[:before], wanted], run)
        )
        after = dict(
            (each.picture, maps) for each, maps in encoded([wanted, *others[before:]], run)
        )
        assert all(map(torch.equal, found[wanted.picture], after[wanted.picture]))


def test_measure(run):
    layout, flops = measure(run)
    assert layout.shapes == ((4, 4, 24),)
    assert layout.dtypes == (torch.float32,)
    linear = 2 * (4 * 24 * 24 + 2 * 24 * 48) * 2 * 16  # two layers, 16 patches
    patches = 2 * 24 * 3 * 8 * 8 * 16
    assert linear + patches <= flops < 1.2 * (linear + patches)
    mixed = EncoderRun(run.tower, run.device, torch.bfloat16)
    layout, _ = measure(mixed)
    assert layout.dtypes == tuple(m.dtype for m in mixed.encode(torch.zeros(1, 3, 32, 32)))


def test_the_key_names_what_decides_the_features(run, make_model):
    def key(run=run, **model):
        return key_of(describe_features(run, make_model(**model)[1].image_processor))

    keys = [
        key(),
        key(tiling={"type": "pad"}),
        key(EncoderRun(run.tower, run.device, torch.bfloat16)),
    ]
    assert key(connector={"type": "pixel_shuffle", "factor": 2}) == keys[0]
    run.tower.config["source"] = "elsewhere"
    assert key() == keys[0]
    with torch.no_grad():
        next(iter(run.tower.parameters())).view(-1)[0] += 1e-3
    keys.append(key())
    run.tower.config["layer"] = -2
    keys.append(key())
    run.tower.to(torch.bfloat16)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_weights_are_hashed_with_their_names():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert hash_weights(one) == hash_weights(other)
    assert hash_weights(torch.nn.Sequential(one)) != hash_weights(one)
