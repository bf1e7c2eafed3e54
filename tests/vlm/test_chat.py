"""Does the terminal chat answer, remember, save and stop as it says?"""

import argparse
import io
import json
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_recipes.records import to_messages
from vlm import chat
from vlm.chat_session import ChatSession, Sampling
from vlm.cli import main
from vlm.errors import UserError


@pytest.fixture
def session(make_model) -> ChatSession:
    model, processor = make_model()
    return ChatSession(model, processor, Sampling(max_new_tokens=6))


@pytest.fixture
def picture(make_image, tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    make_image().save(path)
    return path


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    return parser.parse_args(words)


def expected_reply(session: ChatSession, messages, images) -> str:
    encoded = session.processor.encode(messages, images, add_generation_prompt=True)
    batch = session.processor.collate([encoded], "left")
    ids = session.model.generate(**batch, max_new_tokens=6, do_sample=False)
    new = ids[0, len(encoded["input_ids"]) :]
    return session.processor.tokenizer.decode(new, skip_special_tokens=True)


def test_turns_and_pictures_are_remembered(session: ChatSession, picture: Path, make_image) -> None:
    session.add_image(picture)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    first = expected_reply(session, messages, [make_image()])
    assert "".join(session.ask("What is this?")) == first
    messages.append({"role": "assistant", "content": [{"type": "text", "text": first}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": "Sure?"}]})
    second = expected_reply(session, messages, [make_image()])
    assert "".join(session.ask("Sure?")) == second
    assert len(session.messages) == 4 and len(session.images) == 1


def babble(session: ChatSession, monkeypatch, word: str = "ab ", seconds: float = 0.0) -> list[int]:
    """Make the model say one word for ever; return a list that grows with each token."""
    ids, said = session.processor.tokenizer(word).input_ids, []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        said.append(ids[len(said) % len(ids)])
        time.sleep(seconds)
        scores = torch.zeros(*hidden.shape[:-1], len(session.processor.tokenizer))
        scores[..., said[-1]] = 1.0
        return scores

    monkeypatch.setattr(session.model, "compute_logits", logits)
    return said


def test_the_reply_comes_in_pieces(make_model, monkeypatch) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=30))
    babble(session, monkeypatch)
    pieces = list(session.ask("Say a lot of words."))
    assert len(pieces) >= 9
    assert "".join(pieces) == "ab " * 10 == session.messages[-1]["content"][0]["text"]


def test_closing_stops_the_model_and_keeps_what_was_said(make_model, monkeypatch) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=900))
    said = babble(session, monkeypatch, seconds=0.002)
    threads = set(threading.enumerate())
    with closing(session.ask("Count to a million.")) as pieces:
        first = next(pieces)
    assert session.messages[-1]["content"][0]["text"] == first
    assert len(said) < 500
    assert set(threading.enumerate()) <= threads
    session.sampling = Sampling(max_new_tokens=3)
    assert "".join(session.ask("And now?"))


def test_clear_keeps_only_the_system_message(make_model, picture: Path) -> None:
    model, processor = make_model()
    session = ChatSession(model, processor, Sampling(max_new_tokens=2), system="Be brief.")
    session.add_image(picture)
    list(session.ask("Hi"))
    session.clear()
    assert [message["role"] for message in session.messages] == ["system"]
    assert session.images == session.waiting == []


def test_an_earlier_question_is_taken_back_with_its_pictures(make_model, make_image) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=2), system="Be brief.")
    for number in range(3):
        session.add_image(make_image(seed=number), name=f"{number}.png")
        list(session.ask(f"Question {number}"))
    assert session.rewind(1) == "Question 1"
    assert [name for name, _ in session.images] == ["0.png"]
    assert [name for name, _ in session.waiting] == ["1.png"]
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    list(session.ask("Another"))
    assert len(session.messages) == 5 and len(session.images) == 2


@pytest.mark.parametrize("beams", [1, 2])
def test_another_thread_ends_the_reply(make_model, monkeypatch, beams: int) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=900, num_beams=beams))
    said = babble(session, monkeypatch, seconds=0.002)
    threading.Timer(0.1, session.stop).start()
    reply = "".join(session.ask("Count to a million."))
    assert reply and reply == session.messages[-1]["content"][0]["text"]
    assert len(said) < 500


def test_beams_come_in_one_piece(make_model, picture: Path) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=6, num_beams=3))
    session.add_image(picture)
    (reply,) = session.ask("What is this?")
    encoded = session.processor.encode(
        session.messages[:1], [session.images[0][1]], add_generation_prompt=True
    )
    batch = session.processor.collate([encoded], "left")
    ids = session.model.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False)
    new = ids[0, len(encoded["input_ids"]) :]
    assert reply == session.processor.tokenizer.decode(new, skip_special_tokens=True)


def test_a_refused_question_changes_nothing(session: ChatSession, picture: Path) -> None:
    session.add_image(picture)
    with pytest.raises(UserError, match="<image>"):
        list(session.ask("what does <image> mean?"))
    with pytest.raises(UserError, match="more than 1023"):
        list(session.ask("x" * 1100))
    assert session.messages == [] and len(session.waiting) == 1
    assert "".join(session.ask("And this?")) is not None


def test_a_reply_never_outgrows_the_language_model(make_model, monkeypatch) -> None:
    session = ChatSession(*make_model(max_position_embeddings=64), Sampling(max_new_tokens=500))
    said = babble(session, monkeypatch)
    list(session.ask("Go on."))
    prompt = session.processor.encode(session.messages[:1], add_generation_prompt=True)
    assert len(prompt["input_ids"]) + len(said) == 64


def test_errors_of_the_model_reach_the_caller(session: ChatSession, monkeypatch) -> None:
    monkeypatch.setattr(session.model, "compute_logits", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.ask("Hi"))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_question_the_model_failed_at_is_taken_back(
    make_model, picture: Path, monkeypatch, beams: int
) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=30))
    list(session.ask("Hi"))
    session.sampling = Sampling(max_new_tokens=30, num_beams=beams)
    session.add_image(picture)
    before = list(session.messages)
    said = babble(session, monkeypatch)
    speak = session.model.compute_logits
    monkeypatch.setattr(
        session.model, "compute_logits", lambda hidden: speak(hidden) if len(said) < 20 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        list(session.ask("What is this?"))
    assert session.messages == before and session.images == []
    assert [name for name, _ in session.waiting] == [str(picture)]
    said.clear()
    monkeypatch.setattr(session.model, "compute_logits", speak)
    list(session.ask("What is this?"))
    assert len(session.messages) == 4 and len(session.images) == 1


def test_a_failure_brings_no_forgotten_conversation_back(make_model, monkeypatch) -> None:
    session = ChatSession(*make_model(), Sampling(max_new_tokens=30))
    monkeypatch.setattr(session.model, "compute_logits", lambda hidden: session.clear() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.ask("Hi"))
    assert session.messages == []


def test_saved_conversations_are_training_records(
    make_model, picture: Path, make_image, tmp_path: Path
) -> None:
    model, processor = make_model()
    session = ChatSession(
        model, processor, Sampling(max_new_tokens=9, temperature=1.0), "Be brief."
    )
    session.add_image(picture)
    session.add_image(picture)
    list(session.ask("Same?"))
    session.save(tmp_path / "talk.json")
    (raw,) = json.loads((tmp_path / "talk.json").read_text())
    assert raw["image"] == [str(picture)] * 2
    raw["conversations"][-1]["value"] = session.messages[-1]["content"][0]["text"] = "Yes."
    record = to_messages(raw, "talk.json")
    images = [make_image(), make_image()]
    one = processor.encode(record.messages, images)["input_ids"]
    two = processor.encode(session.messages, images)["input_ids"]
    assert one.tolist() == two.tolist()
    with pytest.raises(UserError, match="cannot write"):
        session.save(tmp_path / "no" / "talk.json")


def test_one_prompt_prints_the_reply_and_ends(model_folder, picture, session, capsys, make_image):
    words = [str(model_folder), str(picture), "--prompt", "What is this?", "--max-new-tokens", "6"]
    assert main(["chat", *words]) == 0
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    reply = expected_reply(session, [{"role": "user", "content": content}], [make_image()])
    assert capsys.readouterr().out == reply + "\n"


def test_a_pipe_of_questions_and_commands(
    model_folder, picture: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"/image {picture}\nWhat?\n\nSure?\n/save {saved}\n/clear\nHi\n/quit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert chat.run(options(str(model_folder), "--max-new-tokens", "3")) == 0
    (record,) = json.loads(saved.read_text())
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
    assert record["conversations"][0]["value"] == "<image>\nWhat?"
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize(
    "line, words",
    [
        ("/image gone.png", "gone.png: no such file"),
        ("/image", "needs a picture's path"),
        ("/save", "needs a file's path"),
        ("/imagine x", "unknown command /imagine"),
    ],
)
def test_mistakes_end_a_pipe_with_2_and_a_terminal_goes_on(
    line, words, model_folder, session, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(line + "\nHi\n"))
    assert main(["chat", str(model_folder)]) == 2
    assert words in capsys.readouterr().err
    replies = iter([line, "/help", " /slash", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    assert chat.converse(session, interactive=True, name="tiny") == 0
    assert words in capsys.readouterr().out
    assert session.messages[0]["content"][0]["text"] == "/slash"


def test_ctrl_c_drops_a_line_or_a_reply_not_the_chat(session: ChatSession, capsys, monkeypatch):
    typed = iter([KeyboardInterrupt, "Hi", EOFError])

    def read(_):
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", read)
    stream = session._stream

    def interrupted(inputs):
        yield next(iter(stream(inputs)))
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_stream", interrupted)
    assert chat.converse(session, interactive=True, name="tiny") == 0
    assert session.messages[-1]["content"][0]["text"]
    assert "..." in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["gone.png"], "gone.png"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_wrong_options_are_named(words, message, model_folder, capsys) -> None:
    assert main(["chat", str(model_folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys) -> None:
    assert main(["chat", str(tmp_path), "--prompt", "Hi"]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint" in error and len(error.splitlines()) == 1


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(model_folder, capsys):
    assert main(["chat", str(model_folder), "--prompt", "  "]) == 2
    assert "--prompt is empty" in capsys.readouterr().err
