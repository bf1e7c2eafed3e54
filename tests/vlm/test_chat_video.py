"""Does a chat take videos: sampled as the model wants, fitted to its context, and saved?"""

import json

import pytest

from data_recipes.dataset import ConversationDataset
from data_recipes.mixture import Source
from vlm import chat
from vlm.chat_session import ChatSession, Sampling
from vlm.cli import main
from vlm.errors import UserError
from vlm.video_times import ShownVideo


@pytest.fixture(scope="module")
def clip(tmp_path_factory, make_clip):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", num_frames=60)


@pytest.fixture
def session(make_model):
    model, processor = make_model()
    processor.image_processor.set_video({"frames": 32, "stride": 1})  # 16 tokens a frame
    model.model.set_video(processor.image_processor.video_config)
    return ChatSession(model, processor, Sampling(max_new_tokens=4))


def test_videos_and_pictures_are_remembered_and_saved(session, clip, make_image, tmp_path):
    make_image().save(tmp_path / "a.png")
    session.add_image(tmp_path / "a.png")
    video = session.add_video(clip)
    assert (len(video.frames), video.num_file_frames, video.duration) == (32, 60, 2.4)
    "".join(session.ask("What moves?"))
    "".join(session.ask("And then?"))
    assert [entry["type"] for entry in session.messages[0]["content"]] == ["image", "video", "text"]
    session.save(tmp_path / "talk.json")
    (record,) = json.loads((tmp_path / "talk.json").read_text())
    assert record["video"] == str(clip) and record["image"] == str(tmp_path / "a.png")
    assert record["conversations"][0]["value"] == "<image>\n<video>\nWhat moves?"
    for turn in record["conversations"][1::2]:
        turn["value"] = turn["value"].strip() or "Nothing."  # a random model may say nothing
    (tmp_path / "talk.json").write_text(json.dumps([record]))
    source = Source(name="talk", path=str(tmp_path / "talk.json"))
    row = ConversationDataset([source], session.processor)[0]
    assert row["tile_grids"].tolist() == [[1, 1], [0, 32]]
    assert session.rewind(0) == "What moves?"
    assert [name for name, _ in session.waiting] == [str(tmp_path / "a.png"), str(clip)]


def test_as_many_frames_as_fit(session, clip):
    session.model.config.text_config.max_position_embeddings = 300
    session.add_video(clip)
    session.add_image(session.waiting[0][1].frames[0], name="first")
    sentence = session.fit_videos("What moves?")
    kept = len(session.waiting[0][1].frames)
    assert sentence == (
        f"{kept} of 32 frames are looked at: question and reply have to fit the model's 300 "
        "tokens, 4 of them for the reply"
    )
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video"},
                {"type": "image"},
                {"type": "text", "text": "What moves?"},
            ],
        }
    ]
    length = session.processor.prompt_length(messages, [ShownVideo(kept), (64, 48)])
    assert length + 4 <= 300 < length + 16 + 4
    assert session.waiting[0][1].times[-1] == pytest.approx(59 / 25)  # first and last are kept
    assert session.fit_videos("What moves?") is None
    assert sum(1 for _ in session.ask("What moves?")) >= 0 and len(session.messages) == 2


def test_a_long_reply_leaves_half_of_the_context_to_the_frames(session, clip):
    """Which are left out for good: a later question with a shorter reply would miss them."""
    session.model.config.text_config.max_position_embeddings = 300
    session.sampling = Sampling(max_new_tokens=2048)
    session.add_video(clip)
    assert "tokens, 150 of them for the reply" in session.fit_videos("What moves?")
    shown = ShownVideo(len(session.waiting[0][1].frames))
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}
    ]
    length = session.processor.prompt_length(messages, [shown])
    assert length <= 150 < length + 16


def test_a_question_that_is_too_long_with_one_frame(session, clip):
    session.model.config.text_config.max_position_embeddings = 40
    session.add_video(clip)
    with pytest.raises(UserError, match="more than 39,"):
        list(session.ask("What moves?" * 9))
    assert session.messages == []


def test_commands(session, clip, capsys):
    assert chat.obey(session, f"/video {clip}")
    assert "32 of 60 frames, at 0.00, 0.04, 0.12" in capsys.readouterr().out
    with pytest.raises(UserError, match="/video needs a video's path"):
        chat.obey(session, "/video")
    with pytest.raises(UserError, match="no such file"):
        chat.obey(session, "/video gone.mp4")


def test_named_on_the_command_line(model_folder, clip, capsys, tmp_path):
    words = ["chat", str(model_folder), str(clip), "--prompt", "Hi?", "--max-new-tokens", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    (tmp_path / "no.mp4").write_text("no video")
    assert main(["chat", str(model_folder), str(tmp_path / "no.mp4"), "--prompt", "Hi?"]) == 2
    assert "no video (known are MP4" in capsys.readouterr().err
