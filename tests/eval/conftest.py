"""What do the scoring tests share? A benchmark file, answerers without a model, a tiny model."""

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from eval.answering import Answer, Question
from vlm.answers import LETTERS, read_answer
from vlm.encoders import build_vision_encoder
from vlm.loading import assemble

SOURCES = {"Relation": "ADE20K", "Count": "COCO", "Depth": "Omni3D", "Distance": "Omni3D"}


def question_row(index: int, task: str, chance: random.Random) -> dict[str, Any]:
    """Return one row in CV-Bench's schema; Count has four to six options, the others two."""
    options = {
        "Relation": ["left", "right"],
        "Count": [str(n) for n in range(chance.choice([4, 5, 6]))],
    }.get(task, ["lamp", "door"])
    chance.shuffle(options)
    picture = Image.new("RGB", (24, 20), tuple(chance.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    lines = "".join(f"\n({LETTERS[i]}) {text}" for i, text in enumerate(options))
    return {
        "idx": index,
        "type": "3D" if task in ("Depth", "Distance") else "2D",
        "task": task,
        "image": {"bytes": buffer.getvalue(), "path": None},
        "question": f"Question {index}, {'of some length ' * chance.randrange(4)}?",
        "choices": options,
        "answer": f"({chance.choice(LETTERS[: len(options)])})",
        "prompt": f"{task} {index}? Select from the following choices.{lines}",
        "source": chance.choice(["ADE20K", "COCO"]) if task == "Count" else SOURCES[task],
    }


@pytest.fixture(scope="session")
def write_benchmark() -> Callable[..., Path]:
    """Return write(path, per_task, row_group_size) -> path of a parquet in CV-Bench's schema."""

    def write(path: Path, per_task: int = 5, row_group_size: int = 100, seed: int = 0) -> Path:
        chance = random.Random(seed)
        tasks = [task for task in SOURCES for _ in range(per_task)]
        rows = [question_row(i, task, chance) for i, task in enumerate(tasks)]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
        return path

    return write


class FakeAnswerer:
    """Answers without a model: `choose(question number) -> letter or reply` decides."""

    def __init__(self, choose: Callable[[int, Sequence[str]], str], identity: str = "fake") -> None:
        self.choose = choose
        self.name = identity
        self.asked = 0
        self.batches: list[list[int]] = []

    def identity(self) -> dict[str, str]:
        return {"weights": self.name, "processor": "none"}

    def encode(
        self, messages: list[dict[str, Any]], images: list[Image.Image], choices: tuple[str, ...]
    ) -> Question:
        text = messages[0]["content"][-1]["text"]
        number = int(text.split("?")[0].split()[-1])
        ids = torch.zeros(len(text) + 64 * len(images), dtype=torch.long)
        return Question(encoded={"input_ids": ids, "number": number}, choices=choices)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += len(questions)
        self.batches.append([question.encoded["number"] for question in questions])
        answers = []
        for question in questions:
            reply = self.choose(question.encoded["number"], question.choices)
            reading = read_answer(reply, question.choices)
            chosen = LETTERS.index(reading.letter) if reading.letter else 0
            scores = tuple(-1.0 if i == chosen else -5.0 for i in range(len(question.choices)))
            answers.append(
                Answer(reply=reply, reading=reading, log_likelihoods=scores, finished=True)
            )
        return answers


@pytest.fixture
def fake_answerer() -> type[FakeAnswerer]:
    """Return the class of answerers without a model."""
    return FakeAnswerer


CORPUS = [
    "Relation Count Depth Distance Select from the following choices. left right lamp door",
    "red y7 blue y4 so below (A) (B) (C) (D) (E) (F) The answer is",
]


@pytest.fixture(scope="session")
def tiny_vlm() -> tuple[Any, Any]:
    """Return a random vision-language model of 0.1 M parameters, and its processor."""
    return build_tiny_vlm()


@pytest.fixture(scope="session")
def merging_vlm() -> tuple[Any, Any]:
    """Return the same with a tokenizer that has "(A)" to "(D)" as one token each."""
    return build_tiny_vlm(["(A)", "(B)", "(C)", "(D)"])


def build_tiny_vlm(more_tokens: Sequence[str] = ()) -> tuple[Any, Any]:
    """Return a random model and its processor."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    encoder = build_vision_encoder(
        {
            "type": "transformers",
            "layer": "last",
            "image_size": 16,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "architecture": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
        }
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.add_tokens(list(more_tokens))
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model, processor = assemble(
        encoder,
        {"type": "mlp", "depth": 2},
        language_model,
        {"type": "resize"},
        tokenizer,
        chat_template="chatml",
    )
    return model.eval(), processor
