"""Is a model told of times in LLaVA-Video's words, everywhere alike, every token counted?"""

import numpy as np
import pytest
from PIL import Image

from vlm.chat_session import ChatSession, Sampling
from vlm.video import VideoFacts, video_of_frames
from vlm.video_layout import VideoConfig
from vlm.video_times import ShownVideo, shown_video, time_sentence, with_times

# llava/train/train.py of LLaVA-NeXT, for 3 frames of a 2.5 s video.
SAID = (
    "The video lasts for 2.50 seconds, and 3 frames are uniformly sampled from it. These frames "
    "are located at 0.00s,1.00s,2.00s.Please answer the following questions related to this video."
)
TOLD = ShownVideo(3, SAID)
VALUES = {"time_instruction": True, "newline": "frame"}


def test_the_words():
    assert time_sentence((0.0, 1.0, 2.0), 2.5) == SAID
    facts = VideoFacts((0.0, 1.0, 2.0), 2.5, 9)
    assert shown_video(facts, VideoConfig(time_instruction=True)) == TOLD
    assert shown_video(facts, VideoConfig()) == ShownVideo(3)


def entries(*parts):
    kinds = {"<image>": "image", "<video>": "video"}
    return [
        {"type": kinds[part]} if part in kinds else {"type": "text", "text": part} for part in parts
    ]


@pytest.mark.parametrize(
    ("content", "shown", "expected"),
    [
        (("<video>", "\nWhat?"), [TOLD], ("<video>", f"\n{SAID}\n", "What?")),
        (("<video>", "What?"), [TOLD], ("<video>", f"\n{SAID}\n", "What?")),
        (("What?\n", "<video>"), [TOLD], ("What?\n", "<video>", f"\n{SAID}")),
        (
            ("<image>", "<video>", "<video>", "\nSame?"),
            [(4, 4), TOLD, ShownVideo(2)],
            ("<image>", "<video>", f"\n{SAID}\n", "<video>", "\nSame?"),
        ),
        (("<video>", "\nWhat?"), [ShownVideo(3)], ("<video>", "\nWhat?")),
        (("\nHello",), [], ("\nHello",)),
    ],
)
def test_where_they_stand(content, shown, expected):
    (message,) = with_times([{"role": "user", "content": entries(*content)}], shown)
    assert message["content"] == entries(*expected)


@pytest.fixture(scope="module")
def made(make_model):
    model, processor = make_model(chat_template="chatml")
    model.model.set_video(VideoConfig(**VALUES))
    processor.image_processor.set_video(VALUES)
    return model, processor


@pytest.fixture(scope="module")
def video():
    noise = np.random.default_rng(0).integers(0, 256, (5, 30, 40, 3), np.uint8)
    return video_of_frames([Image.fromarray(frame) for frame in noise])


def test_training_chat_and_counting_are_alike(made, video):
    model, processor = made
    sentence = time_sentence(video.times, video.duration)
    talk = [
        {"role": "user", "content": entries("<video>", "\nWhat moves?")},
        {"role": "assistant", "content": "All of it."},
    ]
    encoded = processor.encode(talk, videos=[video], supervise=True)
    ids = encoded["input_ids"].tolist()
    first = ids.index(processor.image_token_id)
    text = processor.tokenizer.decode(ids[first + ids.count(processor.image_token_id) :])
    assert text.startswith(f"\n{sentence}\nWhat moves?<|im_end|>")
    learnt = encoded["input_ids"][encoded["labels"] != -100].tolist()
    assert processor.tokenizer.decode(learnt) == "All of it.<|im_end|>"
    shown = [processor.shown(video)]
    assert processor.num_tokens(talk, shown) == len(ids)
    again = processor.encode(talk, shown=shown, supervise=True)["input_ids"]
    assert again.tolist() == ids

    session = ChatSession(model, processor, Sampling(max_new_tokens=4))
    session.add_video(video)
    list(session.ask("What moves?"))
    prompt = session._encode(session.messages[:1], [video])["input_ids"][0].tolist()
    asked = processor.encode(talk[:1], videos=[video], add_generation_prompt=True)["input_ids"]
    assert prompt == asked.tolist() and prompt == ids[: len(prompt)]
    assert processor.prompt_length(talk[:1], shown) == len(prompt)


def test_frames_are_left_out_for_the_sentence_too(made, video, monkeypatch):
    model, processor = made
    asked = [{"role": "user", "content": entries("<video>", "What?")}]
    length = processor.prompt_length(asked, [processor.shown(video)])
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + 3)
    session = ChatSession(model, processor, Sampling(max_new_tokens=4))
    session.add_video(video)
    assert "4 of 5 frames are looked at" in (session.fit_videos("What?") or "")
    (kept,) = (medium for _, medium in session.waiting)
    assert f"and {len(kept.frames)} frames" in processor.shown(kept).told
    # a frame with its newline, and one time such as "1.00s,"
    assert processor.prompt_length(asked, [processor.shown(kept)]) == length - 5 - len("1.00s,")
