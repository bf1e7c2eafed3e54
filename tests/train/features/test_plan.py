"""Are features stored where that pays, and nowhere else?"""

import pytest

from train.features.plan import Demand, FeatureCache, Room, budget, decide
from train.features.work import PartWork, flops
from vlm.errors import UserError

T = 1e12
ROOM = Room(used=0, free=10**13)


def demand(encoder, other, readings=1000, missing=1000, later=0):
    """1000 pictures of a megabyte each; FLOPs are per reading."""
    return Demand(readings, 1000, missing, later, encoder * readings, other * readings, 10**6)


@pytest.mark.parametrize(
    "given, runs, use, saved",
    [
        # A 7B model behind CLIP-L: never.
        (demand(0.38 * T, 24.3 * T), 1, False, 0.0),
        (demand(0.38 * T, 24.3 * T, missing=0), 1, False, 0.0154),
        (demand(0.38 * T, 24.3 * T), 100, False, 0.0152),
        # A 0.5B model behind SO400M-384, one epoch: only where features are there, or for others.
        (demand(0.67 * T, 2.33 * T), 1, False, 0.0),
        (demand(0.67 * T, 2.33 * T, missing=0), 1, True, 0.2233),
        (demand(0.67 * T, 2.33 * T), 2, False, 0.1117),
        (demand(0.67 * T, 2.33 * T), 10, True, 0.201),
        # The same over epochs, and with half of the pictures stored.
        (demand(0.67 * T, 2.33 * T, readings=4000), 1, True, 0.1675),
        (demand(0.67 * T, 2.33 * T, missing=500), 1, False, 0.1117),
        # Or a second stage on the same pictures, not on others.
        (demand(0.67 * T, 2.33 * T, later=3000), 1, True, 0.1675),
        (demand(0.67 * T, 2.33 * T, later=100), 1, False, 0.0203),
        # A language model so small that the encoder is most of the work.
        (demand(9 * T, 1 * T, readings=2000), 1, True, 0.45),
        (demand(9 * T, 1 * T, readings=1100), 1, False, 0.0818),
        # A connector trained alone on features: nothing else is computed.
        (demand(1 * T, 0.0, readings=2000), 1, True, 0.5),
    ],
)
def test_where_it_pays(given, runs, use, saved):
    decision = decide(FeatureCache(folder="x", max_gb=1e6, runs=runs), given, ROOM)
    assert decision.use is use
    assert decision.numbers["saved_share"] == pytest.approx(saved, abs=1e-4)
    assert f"saves {saved:.1%} of the FLOPs" in decision.why
    always = decide(FeatureCache(folder="x", max_gb=1e6, mode="always"), given, ROOM)
    assert always.use


@pytest.mark.parametrize(
    "max_gb, room, allowed, use",
    [
        (50, Room(used=0, free=10**12), 50 * 10**9, True),
        (1, Room(used=0, free=10**12), 10**9, True),
        (0.999, Room(used=0, free=10**12), 999 * 10**6, False),
        (2, Room(used=15 * 10**8, free=10**12), 5 * 10**8, False),
        (2, Room(used=3 * 10**9, free=10**12), 0, False),
        (50, Room(used=0, free=125 * 10**7), 10**9, True),  # a fifth of the disk stays free
        (50, Room(used=0, free=124 * 10**7), 992 * 10**6, False),
    ],
)
def test_there_must_be_room(max_gb, room, allowed, use):
    settings = FeatureCache(folder="x", max_gb=max_gb, mode="always")
    assert budget(settings, room) == allowed
    decision = decide(settings, demand(T, T), room)
    assert decision.use is use
    if not use:
        assert f"1 GB to write, but max_gb {max_gb:g} and the disk leave" in decision.why
    nothing_to_write = decide(settings, demand(T, T, missing=0), room)
    assert nothing_to_write.use


def test_a_stage_without_pictures():
    none = Demand(0, 0, 0, 0, 0.0, T, 1.0)
    assert decide(FeatureCache(folder="x", mode="always"), none, ROOM).why == (
        "the stage shows no pictures"
    )


@pytest.mark.parametrize(
    "values, words", [({"max_gb": 0}, "max_gb must be above 0"), ({"runs": 0}, "runs must be 1")]
)
def test_settings_are_checked(values, words):
    with pytest.raises(UserError, match=words):
        FeatureCache(**values)


@pytest.mark.parametrize(
    "parts, recomputed, expected",
    [
        # LLaVA-1.5's stage 1, by the published sizes: 8.1 forward, backward and recomputed each.
        ([PartWork(6_600_000_000, 0, 606)], True, 24.0 * T),
        ([PartWork(6_600_000_000, 0, 606)], False, 16.0 * T),
        # All trains: 6 FLOPs per parameter and token.
        ([PartWork(1000, 1000, 10)], False, 60_000),
        ([PartWork(1000, 1000, 10), PartWork(50, 0, 2)], True, 80_000 + 600),
    ],
)
def test_flops_of_a_record(parts, recomputed, expected):
    assert flops(parts, recomputed) == pytest.approx(expected, rel=1e-3)
