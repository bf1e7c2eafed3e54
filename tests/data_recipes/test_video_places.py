"""Are videos in folders, lists, tars and parquet files found, with files' rows and lengths?"""

import json
import tarfile
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_recipes.dataset import ConversationDataset
from data_recipes.feature_store import content_of, state_of
from data_recipes.image_files import read
from data_recipes.lengths import RecordLengths
from data_recipes.mixture import Source
from data_recipes.records import to_messages
from vlm.cli import main
from vlm.errors import UserError

TURNS = [{"from": "human", "value": "<video>\nWhere to?"}, {"from": "gpt", "value": "Left."}]
BOTH = [{"from": "human", "value": "<image><video>?"}, {"from": "gpt", "value": "Left."}]
VIDEO = {"frames": 4, "newline": "frame", "time_instruction": True}


@pytest.fixture(scope="module")
def processor(make_model):
    _, processor = make_model()
    processor.image_processor.set_video(VIDEO)
    return processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_clip, make_image):
    folder = tmp_path_factory.mktemp("places")
    make_clip(folder / "a.mp4", num_frames=9)
    (folder / "frames").mkdir()
    for number in range(6):
        make_image(48, 40, number).save(folder / f"frames/{number}.png")
    return folder


def rows_of(path, processor, **source):
    """Return the dataset and its first epoch's rows by id, having checked their lengths."""
    dataset = ConversationDataset([Source(name="v", path=str(path), **source)], processor)
    rows = [dataset[n] for n in range(len(dataset))]
    assert RecordLengths(dataset)(0, len(rows)).tolist() == [len(r["input_ids"]) for r in rows]
    return dataset, {row["record_id"]: row for row in rows}


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, value in members:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def test_folders_and_lists_of_frames(folder, processor):
    listed = ["frames/0.png", "frames/2.png"]
    entry = [{"type": "video", "video": listed}, {"type": "text", "text": "?"}]
    rows = [
        {"id": "folder", "video": "frames/", "conversations": TURNS},
        {"id": "list", "video": listed, "conversations": TURNS},
        {
            "id": "lists",
            "videos": [listed, ["frames/1.png"], "a.mp4"],
            "conversations": [{"from": "human", "value": "<video>" * 3}, TURNS[1]],
        },
        {"id": "entry", "messages": [{"role": "user", "content": entry},
                                     {"role": "assistant", "content": "Left."}]},
    ]  # fmt: skip
    path = folder / "frames.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, found = rows_of(path, processor)
    grids = {name: row["tile_grids"].tolist() for name, row in found.items()}
    assert grids == {"folder": [[0, 4]], "list": [[0, 2]], "lists": [[0, 2], [0, 1], [0, 4]],
                     "entry": [[0, 2]]}  # fmt: skip
    text = processor.tokenizer.decode(found["folder"]["input_ids"])
    assert "lasts for 3.00 seconds" in text and "at 0.00s,0.50s,1.50s,2.50s." in text
    _, slower = rows_of(path, processor, frame_rate=1.0)
    assert "lasts for 6.00 seconds" in processor.tokenizer.decode(slower["folder"]["input_ids"])
    assert main(["data", "check", str(path), "--decode"]) == 0
    with pytest.raises(UserError, match="frame_rate must be above 0"):
        Source(name="v", path="x", frame_rate=0)
    # a file's state, and its content, change with any of its frames
    (file,) = dataset.files(dataset.record(0, 0), 0)
    state, content = state_of(file), content_of(read(file))
    assert state == state_of(file) and content == content_of(read(file))
    frame = folder / "frames/3.png"
    frame.write_bytes(frame.read_bytes() + b"\0")
    assert state != state_of(file) and content != content_of(read(file))


def test_clips_and_frames_inside_a_tar(folder, processor):
    clip = (folder / "a.mp4").read_bytes()
    picture = [(folder / f"frames/{number}.png").read_bytes() for number in range(3)]
    write_tar(folder / "0.tar", [
        ("1.mp4", clip), ("1.json", {"conversations": TURNS}),
        ("2.mp4", clip), ("2.json", {"conversations": TURNS, "video": "mp4"}),
        ("3.0.png", picture[0]), ("3.1.png", picture[1]), ("3.2.png", picture[2]),
        ("3.json", {"conversations": BOTH, "video": ["2.png", "0.png"]}),
        ("4.png", picture[0]), ("4.mp4", clip), ("4.json", {"conversations": BOTH}),
        ("5.png", picture[0]), ("5.json", {"conversations": BOTH, "video": "a.mp4"}),
    ])  # fmt: skip
    dataset, found = rows_of(folder / "0.tar", processor)
    assert {name: row["tile_grids"].tolist() for name, row in found.items()} == {
        "1": [[0, 4]],
        "2": [[0, 4]],
        "3": [[1, 1], [0, 2]],  # the frames are not shown as pictures too
        "4": [[1, 1], [0, 4]],
        "5": [[1, 1], [0, 4]],
    }
    alone = processor.image_processor.sample(folder / "a.mp4")
    views = processor.image_processor.normalize(processor.image_processor.frame_views(alone))
    assert torch.equal(found["1"]["pixel_values"], views)
    (file,) = dataset.files(dataset.record(0, 0), 0)
    assert str(file) == f"{folder / '0.tar'}: 1.mp4"
    assert state_of(file) == state_of(file) and len(read(file)) == len(read(file))
    write_tar(folder / "bad.tar", [
        ("1.mp4", clip[:200]), ("1.json", {"conversations": TURNS}),
        ("2.mp4", clip), ("2.json", {"conversations": TURNS, "video": "b.mp4"}),
    ])  # fmt: skip
    bad = ConversationDataset([Source(name="v", path=str(folder / "bad.tar"))], processor)
    for number, words in enumerate((r"bad\.tar: 1\.mp4 cannot be read", r"names 'b\.mp4', but")):
        with pytest.raises(UserError, match=words):
            bad.encode(0, number)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("struct", [False, True])
def test_clips_inside_a_parquet_file(folder, processor, several, struct):
    clip = (folder / "a.mp4").read_bytes()
    held = {"bytes": clip, "path": "a.mp4"} if struct else clip
    picture = {"bytes": (folder / "frames/0.png").read_bytes(), "path": None}
    rows = [
        {"id": "clip", "video": [held] if several else held, "conversations": TURNS},
        {"id": "none", "conversations": [{"from": "human", "value": "Hi?"}, TURNS[1]]},
        {"id": "both", "image": picture, "video": [held] if several else held,
         "conversations": BOTH},
    ]  # fmt: skip
    path = folder / "clips.parquet"
    names = ("id", "image", "video", "conversations")
    pq.write_table(pa.Table.from_pylist([{n: r.get(n) for n in names} for r in rows]), path)
    dataset, found = rows_of(path, processor)
    assert found["clip"]["tile_grids"].tolist() == [[0, 4]]
    assert found["both"]["tile_grids"].tolist() == [[1, 1], [0, 4]]
    assert "tile_grids" not in found["none"]
    clips = [file for row in (0, 2) for file in dataset.files(dataset.record(0, row), 0)]
    assert [str(file) for file in clips] == [
        f"{path}, row 0, video 1",
        f"{path}, row 2, picture 1",
        f"{path}, row 2, video 1",
    ]


def test_a_picture_alone_is_no_video(folder, processor):
    """An animation in it would be lost; a list of one picture says what is meant."""
    entry = [{"type": "video", "video": "frames/0.png"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": "Left."}
    for raw in ({"video": "frames/0.png", "conversations": TURNS},
                {"messages": [{"role": "user", "content": entry}, answer]}):  # fmt: skip
        assert to_messages(raw, "x").videos == ("frames/0.png",)
    path = folder / "alone.json"
    path.write_text(json.dumps([{"video": "frames/0.png", "conversations": TURNS}]))
    with pytest.raises(UserError, match=r"frames/0\.png cannot be read: it is damaged"):
        ConversationDataset([Source(name="v", path=str(path))], processor)[0]
    path.write_text(json.dumps([{"video": ["frames/0.png", "9.png"], "conversations": TURNS}]))
    assert main(["data", "check", str(path)]) == 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": 1}, "'video' must be a path, a list of paths, or a list of frames"),
        ([["a.png", "b.mp4"]], r'list of frames has "b\.mp4" among them'),
        ([[]], "'video' must be a path"),
        (["a.png", "b.mp4"], r"2 video\(s\) but 1 <video>"),
        ([["a.png", 3]], "'video' must be a path"),
    ],
)
def test_what_is_no_video(value, words):
    with pytest.raises(UserError, match=words):
        to_messages({"video": value, "conversations": TURNS}, "x")
