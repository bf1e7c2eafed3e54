"""Are lengths, pictures and shares those of the rows that training makes, and of how many?"""

import json

import numpy as np
import pytest

from data_recipes.dataset import IGNORED, ConversationDataset
from data_recipes.mixture import Source
from data_recipes.stats import SourceStats, chosen, collect, summary, table
from data_recipes.stats_figure import draw
from vlm.errors import UserError


def row(number, pictures=1, answer="A cat."):
    question = "<image>" * pictures + "What?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    image = {"image": ["0.png"] * pictures} if pictures else {}
    return {"id": f"r{number}", "conversations": turns, **image}


@pytest.fixture
def dataset(tmp_path, make_model, make_image):
    _, processor = make_model()
    make_image().save(tmp_path / "0.png")
    rows = {
        "text": [row(n, 0, "long " * n) for n in range(1, 9)],
        "shown": [*(row(n, n) for n in (1, 1, 2)), {**row(9), "image": ["gone.png"]}],
    }
    for name, items in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    sources = [Source(name="text", path=str(tmp_path / "text.jsonl"), repeat=0.5)]
    sources.append(Source(name="shown", path=str(tmp_path / "shown.jsonl"), repeat=2))
    return ConversationDataset(sources, processor)


def test_counts_are_those_of_the_rows(dataset):
    text, shown = collect(dataset, 100)
    assert (text.records, text.per_epoch, text.read, text.faults) == (8, 4, 4, 0)
    assert (shown.records, shown.per_epoch, shown.read, shown.faults) == (4, 8, 8, 2)
    assert sorted(shown.images.tolist()) == [1, 1, 1, 1, 2, 2]
    made = {"text": [], "shown": []}
    for position in range(12):
        number, _ = dataset.mixture.locate(position)
        try:
            labels = dataset[position]["labels"]
        except UserError:
            continue
        found = made[dataset.mixture.sources[number].name]
        found.append((len(labels), int((labels != IGNORED).sum())))
    for each in (text, shown):
        both = np.stack([each.tokens, each.supervised], axis=1).tolist()
        assert [tuple(pair) for pair in both] == made[each.name]


def test_table_and_summary(dataset):
    stats = collect(dataset, 100)
    lines = [line.split() for line in table(stats, max_length=60).splitlines()]
    assert [line[:6] for line in lines[1:]] == [
        ["text", "8", "4", "33.3%", "4", "0"],
        ["shown", "4", "8", "66.7%", "8", "2"],
    ]
    longer = int((stats[0].tokens > 60).sum())
    assert 0 < longer < 4
    assert lines[1][-1] == str(longer)
    assert summary(stats) == "every record of an epoch was read: 12"
    assert summary(collect(dataset, 5)).startswith("5 of an epoch's 12 records were read, drawn")


def test_a_share_counts_faults_as_nothing_learnt():
    values = np.array([10, 20])
    stats = SourceStats(
        name="a", records=9, per_epoch=30, faults=1, tokens=values, supervised=values, images=values
    )
    assert stats.per_record(values) == 30 * 10  # three were read, and one of them is not used


def test_nothing_that_could_be_used(tmp_path):
    none = np.zeros(0, dtype=np.int64)
    stats = [
        SourceStats(
            name="a", records=2, per_epoch=2, faults=2, tokens=none, supervised=none, images=none
        )
    ]
    assert table(stats).splitlines()[1].split()[-7:] == ["-"] * 7
    draw(stats, tmp_path / "a.png")


def test_chosen_positions():
    assert chosen(5, 5, 0).tolist() == [0, 1, 2, 3, 4]
    few = chosen(1000, 10, 0)
    assert len(set(few.tolist())) == 10
    assert few.tolist() == sorted(few.tolist()) == chosen(1000, 10, 0).tolist()
    assert few.tolist() != chosen(1000, 10, 1).tolist()


def test_drawing(dataset, tmp_path):
    draw(collect(dataset, 100), tmp_path / "a.png", max_length=60)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="cannot write"):
        draw(collect(dataset, 100), tmp_path / "gone" / "a.png")
