"""Do records with videos get into training: rows, lengths, stored features, checks, counts?"""

import json

import pytest
import torch

from data_recipes.dataset import Collator, ConversationDataset
from data_recipes.feature_store import FeatureStore, Layout
from data_recipes.feature_writer import FeatureWriter
from data_recipes.lengths import RecordLengths
from data_recipes.mixture import Source
from data_recipes.pictures import PictureViews
from data_recipes.stats import collect
from vlm.cli import main
from vlm.errors import UserError
from vlm.video_layout import VideoConfig

VIDEO = {"frames": 4, "pool": "average", "newline": "frame"}


def record(name, question, **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "It moves left."}]
    return {"id": name, **media, "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_clip, make_image):
    folder = tmp_path_factory.mktemp("videos")
    make_clip(folder / "a.mp4", num_frames=9)
    make_clip(folder / "b.mp4", num_frames=2)  # fewer than the frames asked for
    make_image().save(folder / "0.png")
    rows = [
        record("one", "<video>\nWhere to?", video="a.mp4"),
        record("short", "<image>\nWhere to?", video=["b.mp4"]),
        record("both", "<image><video>Same?<image>", video="a.mp4", image=["0.png", "0.png"]),
        record("text", "Hello?"),
    ]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def made(make_model):
    model, processor = make_model()
    model.model.set_video(VideoConfig(**VIDEO))
    processor.image_processor.set_video(VIDEO)
    return model.eval(), processor


@pytest.fixture(params=[False, True], ids=["plain", "times_told"])
def dataset(request, folder, made):
    processor = made[1].image_processor
    processor.set_video({**VIDEO, "time_instruction": request.param})
    yield ConversationDataset([Source(name="v", path=str(folder / "good.jsonl"))], made[1])
    processor.set_video(VIDEO)


def rows_by_id(dataset):
    return {row["record_id"]: row for row in (dataset[n] for n in range(len(dataset)))}


def test_rows_have_the_frames_where_they_stand(dataset):
    rows = rows_by_id(dataset)
    assert rows["one"]["tile_grids"].tolist() == [[0, 4]]
    assert rows["short"]["tile_grids"].tolist() == [[0, 2]]
    assert rows["both"]["tile_grids"].tolist() == [[1, 1], [0, 4], [1, 1]]
    assert len(rows["both"]["pixel_values"]) == 6
    assert "tile_grids" not in rows["text"]


def test_lengths_are_known_without_decoding(dataset, monkeypatch):
    rows = [len(dataset[n]["input_ids"]) for n in range(len(dataset))]
    monkeypatch.setattr("vlm.video.frames_shown_at", None)
    lengths = RecordLengths(dataset)
    assert lengths(0, len(dataset)).tolist() == rows
    (stats,) = collect(dataset, 100)
    assert (stats.videos, stats.images.sum(), stats.faults) == (3, 2, 0)
    assert sorted(stats.tokens.tolist()) == sorted(rows)


def test_losses_with_stored_features_are_those_without(dataset, made, tmp_path, folder):
    model, processor = made
    items = [dataset[n] for n in range(len(dataset))]

    def loss(collator, items):
        batch = collator(items)
        batch.pop("record_ids"), batch.pop("skipped")
        with torch.no_grad():
            return model(**batch).loss

    expected = loss(Collator(processor), items)
    tower = model.model.vision_tower
    layout = Layout(((4, 4, 24),), (torch.float32,))
    times = dataset.pictures([(0, len(dataset))])
    assert len(times) == 3  # two videos and the picture
    views = PictureViews(list(times), processor.image_processor, FeatureStore(tmp_path, layout))
    with FeatureWriter(tmp_path, layout, 1 << 30) as writer, torch.no_grad():
        for item in (views[n] for n in range(len(views))):
            writer.note(item.state, item.picture)
            writer.add(item.picture, item.grid, list(tower(item.pixel_values)))
    dataset.features = FeatureStore(tmp_path, layout)
    again = PictureViews(list(times), processor.image_processor, dataset.features)
    assert all(again[n].pixel_values is None for n in range(3))
    stored = [dataset[n] for n in range(len(dataset))]
    assert all("pixel_values" not in item for item in stored)
    found = loss(Collator(processor, features=dataset.features), stored)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # other frames of the same file are another entry
    processor.image_processor.set_video({**VIDEO, "fps": 12.5})
    try:
        other = dataset.pictures([(0, len(dataset))])
        views = PictureViews(list(other), processor.image_processor, dataset.features)
        found = [views[n] for n in range(len(views))]
        assert [view.pixel_values is None for view in found if view.grid[0] == 0] == [False, False]
    finally:
        processor.image_processor.set_video(VIDEO)


def test_padded_frames_are_not_stored(folder, make_model):
    _, processor = make_model({"type": "pad"})
    source = Source(name="v", path=str(folder / "good.jsonl"))
    with pytest.raises(UserError, match=r"feature_cache\.mode to never"):
        ConversationDataset([source], processor).pictures([(0, 4)])


def test_left_out_where_a_source_says_so(folder, made):
    source = Source(name="v", path=str(folder / "good.jsonl"), image_position="none")
    dataset = ConversationDataset([source], made[1])
    assert not any("tile_grids" in row for row in rows_by_id(dataset).values())


def test_check_counts_faults_of_videos(folder, capsys):
    assert main(["data", "check", str(folder / "good.jsonl"), "--decode"]) == 0
    assert "4 records, 2 images, 3 videos, 0 record(s)" in capsys.readouterr().out
    (folder / "text.mp4").write_text("no video")
    rows = [
        record("gone", "<video>?", video="gone.mp4"),
        record("text", "<video>?", video="text.mp4"),
        record("two", "<video>?", video=["a.mp4", "a.mp4"]),
    ]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(folder / "bad.jsonl")]) == 2
    out = capsys.readouterr().out
    assert "gone.mp4: no such video file" in out and "2 record(s) with faults" in out
    assert main(["data", "check", str(folder / "bad.jsonl"), "--decode"]) == 2
    out = capsys.readouterr().out
    assert "3 record(s) with faults" in out and "damaged, cut short, or no video" in out


def test_a_fault_names_the_record(folder, made):
    (folder / "bad2.jsonl").write_text(json.dumps(record("r", "<video>?", video="gone.mp4")) + "\n")
    dataset = ConversationDataset([Source(name="v", path=str(folder / "bad2.jsonl"))], made[1])
    with pytest.raises(UserError, match=r"bad2\.jsonl:1 .*video .*gone\.mp4: no such file"):
        dataset[0]
    assert dataset.num_tokens(0) == 0
