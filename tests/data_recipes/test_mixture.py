"""Is the order a pure function of seed, epoch and position, and are shares and caps exact?"""

from collections import Counter

import pytest

from data_recipes.mixture import Mixture, Source, load_mix, parse_sources
from vlm.errors import UserError


def source(name, **kwargs):
    return Source(name=name, path=f"{name}.json", **kwargs)


def epoch(mixture, number=0):
    start = number * len(mixture)
    return [mixture.locate(position) for position in range(start, start + len(mixture))]


def test_one_epoch_has_every_record_once_in_shuffled_order():
    mixture = Mixture([source("a"), source("b")], [30, 20], seed=0)
    order = epoch(mixture)
    everything = [(0, i) for i in range(30)] + [(1, i) for i in range(20)]
    assert sorted(order) == everything
    assert order != everything
    assert sorted(epoch(mixture, 1)) == everything
    assert epoch(mixture, 1) != order


def test_order_depends_on_seed_epoch_and_position_only():
    first = Mixture([source("a"), source("b")], [30, 20], seed=5)
    expected = epoch(first, 0) + epoch(first, 1) + epoch(first, 2)
    second = Mixture([source("a"), source("b")], [30, 20], seed=5)
    backwards = [second.locate(position) for position in reversed(range(150))]
    assert backwards[::-1] == expected
    assert epoch(Mixture([source("a"), source("b")], [30, 20], seed=6)) != epoch(first)


def test_weights_are_shares_of_the_records():
    mixture = Mixture([source("a", weight=3), source("b", weight=1)], [70, 30], seed=0)
    assert len(mixture) == 100
    counts = Counter(number for number, _ in epoch(mixture))
    assert counts == {0: 75, 1: 25}
    # 70 records, 75 asked for: all of them, five twice
    rows = Counter(row for number, row in epoch(mixture) if number == 0)
    assert len(rows) == 70
    assert sorted(rows.values())[-6:] == [1, 2, 2, 2, 2, 2]


def test_no_record_comes_again_before_all_have_come_over_epochs():
    mixture = Mixture([source("a", repeat=0.25), source("b")], [40, 10], seed=0)
    rows = [row for e in range(4) for number, row in epoch(mixture, e) if number == 0]
    assert sorted(rows) == list(range(40))


def test_repeat():
    mixture = Mixture([source("a", repeat=2), source("b", repeat=0.5)], [10, 10], seed=0)
    counts = Counter(epoch(mixture))
    assert [counts[0, row] for row in range(10)] == [2] * 10
    assert sum(counts[1, row] for row in range(10)) == 5


@pytest.mark.parametrize(
    ("cap", "take", "rows"),
    [(3, "first", {0, 1, 2}), (3, "end", {17, 18, 19}), ("10%", "first", {0, 1}), (99, "end", 20)],
)
def test_cap(cap, take, rows):
    mixture = Mixture([source("a", cap=cap, take=take)], [20], seed=0)
    expected = rows if isinstance(rows, set) else set(range(rows))
    assert {row for _, row in epoch(mixture)} == expected


def test_random_cap_is_the_same_in_every_epoch_and_follows_the_seed():
    chosen = []
    for seed in (0, 0, 1):
        mixture = Mixture([source("a", cap="25%", take="random")], [40], seed=seed)
        assert set(epoch(mixture, 0)) == set(epoch(mixture, 3))
        chosen.append(set(epoch(mixture)))
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 10


def test_seen_counts_records_by_source_across_epochs():
    mixture = Mixture([source("a"), source("b")], [30, 20], seed=0)
    assert mixture.seen(0, 100) == {"a": 60, "b": 40}
    part = mixture.seen(7, 63)
    names = Counter("ab"[mixture.locate(position)[0]] for position in range(7, 63))
    assert part == dict(names)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "at least one source"),
        ("x", "at least one source"),
        ([{"path": "a"}], "source 1"),
        ([{"name": "a", "path": "b", "wieght": 2}], "did you mean 'weight'?"),
        ([{"name": "a", "path": "b", "weight": "much"}], "'weight' must be float"),
        ([{"name": "a", "path": "b", "weight": -1}], "weight must be above 0"),
        ([{"name": "a", "path": "b", "repeat": 0}], "repeat must be above 0"),
        ([{"name": "a", "path": "b", "repeat": 2, "weight": 2}], "a weight or a repeat, not both"),
        ([{"name": "a", "path": "b", "cap": "some"}], "cap must be a number of records"),
        ([{"name": "a", "path": "b", "cap": "200%"}], "keeps nothing sensible"),
        ([{"name": "a", "path": "b", "take": "last"}], "'take' must be one of"),
        ([{"name": "a", "path": "b", "image_position": "end"}], "'image_position' must be one of"),
    ],
)
def test_wrong_sources_are_one_sentence(values, sentence):
    with pytest.raises(UserError) as error:
        parse_sources(values, "mix.yaml")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([source("a"), source("a")], "two data sources are named 'a'"),
        ([source("a", weight=1), source("b")], "'b' has no weight"),
    ],
)
def test_sources_that_do_not_go_together(sources, sentence):
    with pytest.raises(UserError, match=sentence):
        Mixture(sources, [1, 1], seed=0)


def test_mix_file(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("sources:\n  - {name: a, path: a.json, cap: 10%, weight: 2}\n")
    assert load_mix(path) == [Source(name="a", path="a.json", cap="10%", weight=2.0)]
    for text, sentence in [("a: [", "is no YAML"), ("a: 1", "must have the one key 'sources'")]:
        path.write_text(text)
        with pytest.raises(UserError, match=r"mix\.yaml") as error:
            load_mix(path)
        assert sentence in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_mix(tmp_path / "gone.yaml")
