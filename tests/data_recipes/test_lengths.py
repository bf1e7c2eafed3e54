"""Are token counts those of the encoded rows, kept on disk, counted anew where need be?"""

import json

import numpy as np
import pytest

from data_recipes.dataset import ConversationDataset
from data_recipes.lengths import RecordLengths
from data_recipes.mixture import Source


@pytest.fixture
def make_dataset(tmp_path, make_image, make_model):
    """(chat template) -> a dataset over two files; one record of ten has no picture on disk."""
    make_image(40, 30).save(tmp_path / "a.png")

    def write(name, count):
        rows = []
        for number in range(count):
            turns = [{"from": "human", "value": "<image>\nWhat?"}]
            turns += [{"from": "gpt", "value": "and " * number + "so on"}]
            image = "none.png" if number == 3 else "a.png"
            rows.append({"id": f"{name}{number}", "image": image, "conversations": turns})
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))

    write("x", 10)
    write("y", 5)

    def make(template="chatml"):
        _, processor = make_model(chat_template=template)
        sources = [Source(name=n, path=str(tmp_path / f"{n}.json")) for n in ("x", "y")]
        return ConversationDataset(sources, processor, on_error="skip")

    return make


def refuse(*_):
    raise AssertionError("counted again")


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_those_of_the_rows(make_dataset, workers):
    dataset = make_dataset()
    lengths = RecordLengths(dataset, workers)
    assert lengths(0, 30).tolist() == [dataset.num_tokens(position) for position in range(30)]
    items = {p: dataset[p] for p in range(15)}
    rows = {p: len(item["input_ids"]) for p, item in items.items() if isinstance(item, dict)}
    assert len(rows) == 13
    found = lengths(0, 15)
    assert {p: int(found[p]) for p in rows} == rows
    assert found[[p for p in items if p not in rows]].tolist() == [0, 0]


def test_they_are_read_back_and_filled_in(make_dataset, tmp_path, monkeypatch):
    dataset = make_dataset()
    lengths = RecordLengths(dataset)
    some = lengths(2, 5)
    lengths.save()
    monkeypatch.setattr(ConversationDataset, "count_tokens", refuse)
    again = RecordLengths(make_dataset())
    assert np.array_equal(again(2, 5), some)
    with pytest.raises(AssertionError, match="counted again"):
        again(0, 15)
    monkeypatch.undo()
    again(0, 15)
    again.save()
    monkeypatch.setattr(ConversationDataset, "count_tokens", refuse)
    assert np.array_equal(RecordLengths(make_dataset())(0, 15), again(0, 15))
    assert len(list(tmp_path.glob(".x.json.lengths-*"))) == 1


def test_they_are_counted_anew(make_dataset, tmp_path):
    lengths = RecordLengths(make_dataset())
    first = lengths(0, 15)
    lengths.save()
    assert not np.array_equal(RecordLengths(make_dataset("vicuna_v1"))(0, 15), first)
    text = (tmp_path / "x.json").read_text().replace("What?", "What is to be seen?")
    (tmp_path / "x.json").write_text(text)
    assert RecordLengths(make_dataset())(0, 15).sum() > first.sum()


def test_where_nothing_can_be_written_they_stay_in_memory(make_dataset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(
        "data_recipes.lengths.cache_places", lambda path, kind: [tmp_path / "file" / path.name]
    )
    lengths = RecordLengths(make_dataset())
    found = lengths(0, 15)
    lengths.save()
    assert np.array_equal(lengths(0, 15), found)
    assert not list(tmp_path.glob(".*lengths*"))
