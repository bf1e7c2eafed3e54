"""Are questions about clips asked with the frames that the model looks at?"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.answering import ModelAnswerer
from eval.harness import evaluate
from eval.protocols import OFFICIAL
from eval.runner import RunPlan
from eval.settings import AnswerSettings
from eval.tasks import TASKS
from vlm.errors import UserError

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
        VideoChoice.open([tmp_path / "t.parquet"]).media(0)
