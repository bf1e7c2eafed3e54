"""Are questions about clips asked with the frames that the model looks at?"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.ablation.gather import pictures_of
from eval.answering import ModelAnswerer
from eval.harness import evaluate
from eval.protocols import OFFICIAL
from eval.runner import RunPlan
from eval.settings import AnswerSettings
from eval.tasks import TASKS
from vlm.errors import UserError
from vlm.video import video_facts

VideoChoice = TASKS["video_choice"]


def row(number, video):
    prompt = "Which way? Select from the following choices.\n(A) left\n(B) right"
    named = {"type": "Video", "task": ("Direction", "First")[number % 2], "source": "s"}
    return {"idx": number, **named, "choices": ["left", "right"], "answer": "(A)", "video": video,
            "prompt": prompt, "question": "Which way?"}  # fmt: skip


@pytest.fixture
def data(tmp_path, make_clip):
    (tmp_path / "clips").mkdir()
    make_clip(tmp_path / "clips/a.mp4", num_frames=12)
    rows = [row(number, "clips/a.mp4") for number in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    return tmp_path / "test.parquet"


def test_a_clip_is_a_path_and_a_strip_for_people(data):
    task = VideoChoice.open([data])
    assert task.media(2) == [data.parent / "clips/a.mp4"]
    (strip,) = task.images(2)
    assert isinstance(strip, Image.Image) and strip.size == (4 * 64, 48)
    seen = task.prompt(task.get_example(0), OFFICIAL, blind=False)
    assert [entry["type"] for entry in seen[0]["content"]] == ["video", "text"]
    blind = task.prompt(task.get_example(0), OFFICIAL, blind=True)
    assert [entry["type"] for entry in blind[0]["content"]] == ["text"]


def test_a_whole_run(data, tiny_vlm, tmp_path):
    model, processor = tiny_vlm
    answerer = ModelAnswerer(model, processor, AnswerSettings(max_new_tokens=3))
    question = answerer.encode(
        VideoChoice.open([data]).prompt(VideoChoice.open([data]).get_example(0), OFFICIAL,
                                        blind=False),
        VideoChoice.open([data]).media(0), ("left", "right"),
    )  # fmt: skip
    assert question.encoded["tile_grids"].tolist() == [[0, 8]]  # the default: 8 frames
    plan = RunPlan(protocol=OFFICIAL, indices=(0, 1, 2, 3), batch_size=2)
    results = evaluate(
        VideoChoice.open([data]), answerer, answerer.settings, plan, tmp_path / "out", {}
    )
    assert results["tasks"]["Direction"]["n"] == 2
    assert (tmp_path / "out/gallery.png").is_file()


def test_rows_without_a_video_are_told(tmp_path):
    pq.write_table(pa.Table.from_pylist([row(0, "")]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 0: no video"):
        VideoChoice.open([tmp_path / "t.parquet"])
    pq.write_table(pa.Table.from_pylist([row(0, "gone.mp4")]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"row 0: video .*gone\.mp4: No such file"):
        VideoChoice.open([tmp_path / "t.parquet"])


def test_clips_that_cannot_be_read_are_told_with_their_row(data, tiny_vlm, tmp_path):
    clip = data.parent / "clips/a.mp4"
    pq.write_table(pa.Table.from_pylist([row(0, "clips/a.mp4"), row(1, "clips/cut.mp4")]), data)
    (data.parent / "clips/cut.mp4").write_bytes(clip.read_bytes()[:-1500])
    task = VideoChoice.open([data])
    words = r"test\.parquet, row 1: video .*cut\.mp4 cannot be read"
    with pytest.raises(UserError, match=words) as told:
        task.images(1)
    assert told.value.code == "video_damaged" and "cut.mp4" in str(told.value.facts["path"])
    answerer = ModelAnswerer(*tiny_vlm, AnswerSettings(max_new_tokens=3))
    plan = RunPlan(protocol=OFFICIAL, indices=(0, 1), batch_size=2)
    with pytest.raises(UserError, match=words):
        evaluate(task, answerer, answerer.settings, plan, tmp_path / "out", {})
    with pytest.raises(UserError, match=words):
        pictures_of(task, (0, 1))


def test_a_folder_without_pictures_is_told_with_its_row(data):
    (data.parent / "none").mkdir()
    pq.write_table(pa.Table.from_pylist([row(0, "clips/a.mp4"), row(1, "none")]), data)
    with pytest.raises(UserError, match=r"test\.parquet, row 1: .*none"):
        VideoChoice.open([data])


def test_clips_are_data_whose_change_is_noticed(data, make_clip):
    def fingerprint():
        return [file.sha256 for file in VideoChoice.open([data]).files]

    before = fingerprint()
    assert len(before) == 2 and VideoChoice.open([data]).files[1].rows == 1
    assert fingerprint() == before
    make_clip(data.parent / "clips/a.mp4", num_frames=11)
    table, clips = fingerprint()
    assert table == before[0] and clips != before[1]


@pytest.mark.parametrize("form", ["bytes", "struct", "folder", "list"])
def test_clips_may_lie_inside_or_be_frames(form, data, make_image):
    clip, folder = data.parent / "clips/a.mp4", data.parent / "frames"
    folder.mkdir()
    for number in range(3):
        make_image(48, 40, number).save(folder / f"{number}.png")
    stored = {
        "bytes": clip.read_bytes(),
        "struct": {"bytes": clip.read_bytes(), "path": "a.mp4"},
        "folder": "frames/",
        "list": ["frames/2.png", "frames/0.png"],
    }[form]
    pq.write_table(pa.Table.from_pylist([row(0, stored)]), data)
    task = VideoChoice.open([data])
    frames = {"bytes": 12, "struct": 12, "folder": 3, "list": 2}[form]
    (source,) = task.media(0)
    assert video_facts(source).num_file_frames == frames
    assert task.images(0)[0].height == (48 if frames == 12 else 40)
    assert len(task.files) == (1 if frames == 12 else 2)
