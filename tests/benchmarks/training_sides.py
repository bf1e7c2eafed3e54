"""How do transformers and the suite train the same model on the same records in the same order?

`prepare` writes random weights once, as a `LlavaNextForConditionalGeneration` and, carried over, as
a checkpoint of ours, and records with pictures. `train_ours` (a recipe) and `train_theirs`
(training_theirs.py) then train from these files.

Both sides freeze the vision tower unless `train_vision`, take one micro-batch a step and AdamW with
the Trainer's defaults.
"""

import vlm  # noqa: F401  # isort: skip - before transformers: it mends torchvision's import

import gc
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

VIEW_SIZE, PATCH_SIZE, LEARNING_RATE = 112, 14, 1e-4
QUESTION_WORDS, ANSWER_WORDS = (8, 30), (12, 60)
HALF = (0.5, 0.5, 0.5)
STAGE = "instruct"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its batches; every head of the language model is 64 wide."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    batch_size: int
    vision_layers: int = 8
    vision_dim: int = 256
    pictures: tuple[int, int] = (80, 500)  # least and largest side
    train_vision: bool = False


@dataclass
class Measured:
    """What one side did: a number a step, and the peak of memory above that of the libraries."""

    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # seconds for the loader
    tokens: list[int] = field(default_factory=list)  # supervised; theirs counts, for both
    places: list[int] = field(default_factory=list)  # of rows, padding included
    padding: list[float] = field(default_factory=list)  # its share
    peak_bytes: int = 0


def prepare(shape: Shape, folder: Path, steps: int) -> None:
    """Write both sides' weights, pictures, records, and the order in which ours comes to them."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(min(shape.vocab_size, 30000))
    theirs: Any = their_model(shape, tokenizer.convert_tokens_to_ids("<image>"))
    theirs.save_pretrained(folder / "theirs")
    tokenizer.save_pretrained(folder / "theirs")
    carry_over(theirs, tokenizer, folder)
    write_records(shape, folder, steps * shape.batch_size, len(tokenizer))
    from train.recipe import parse_recipe

    stage = parse_recipe(recipe_tree(shape, folder, steps), "benchmark").stages[0]
    from train.data import stage_dataset

    mixture = stage_dataset(stage, None, 0).mixture
    order = [int(mixture.locate(position)[1]) for position in range(steps * shape.batch_size)]
    (folder / "order.json").write_text(json.dumps(order))


def word_tokenizer(num_words: int) -> Any:
    """Return a tokenizer of words `w0`, `w1`, ... and the tokens that chat and images need."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "user", "assistant", *(f"w{n}" for n in range(num_words - len(special) - 2))]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[3:]})
    return tokenizer


def their_model(shape: Shape, image_token_id: int) -> Any:
    """Return transformers' model with random weights."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        Qwen2Config,
    )

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_dim,
        intermediate_size=4 * shape.vision_dim,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_dim // 64,
        image_size=VIEW_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // 64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_grid_pinpoints=pinpoints(),
        tie_word_embeddings=True,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.tie_weights()
    return model


def pinpoints() -> list[list[int]]:
    """Return LLaVA-NeXT's grids in pixels, (height, width) as transformers has them."""
    from vlm.tiling import NEXT_GRIDS

    return [[rows * VIEW_SIZE, cols * VIEW_SIZE] for rows, cols in NEXT_GRIDS]


def carry_over(theirs: Any, tokenizer: Any, folder: Path) -> None:
    """Write transformers' model as a checkpoint of ours."""
    from transformers import AutoModelForCausalLM

    from vlm.loading import assemble

    theirs.model.vision_tower.save_pretrained(folder / "encoder")
    language_model = AutoModelForCausalLM.from_config(theirs.config.text_config)
    language_model.model.load_state_dict(theirs.model.language_model.state_dict())
    encoder = {"type": "transformers", "source": str(folder / "encoder"), "layer": -2}
    model, processor = assemble(
        {**encoder, "image_mean": HALF, "image_std": HALF},
        {"type": "mlp", "depth": 2},
        language_model,
        tiling={"type": "anyres"},
        tokenizer=tokenizer,
        chat_template="chatml",
    )
    layers: Any = model.model.connector.get_submodule("layers")
    projector = theirs.model.multi_modal_projector
    layers[0].load_state_dict(projector.linear_1.state_dict())
    layers[2].load_state_dict(projector.linear_2.state_dict())
    newline: Any = model.model.image_newline
    newline.data.copy_(theirs.model.image_newline.data)
    model.save_pretrained(folder / "ours")
    processor.save_pretrained(folder / "ours")


def write_records(shape: Shape, folder: Path, count: int, num_words: int) -> None:
    """Write `count` records, each with a JPEG of coloured patches and a turn of drawn words."""
    draw = np.random.default_rng(0)
    lowest = 10  # above the special tokens
    rows = []
    for number in range(count):
        width, height = (int(side) for side in draw.integers(*shape.pictures, 2, endpoint=True))
        patches = draw.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        picture = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        question, answer = (
            " ".join(f"w{n}" for n in draw.integers(lowest, num_words - lowest, size))
            for size in (draw.integers(*QUESTION_WORDS), draw.integers(*ANSWER_WORDS))
        )
        turns = [("human", f"<image>\n{question}"), ("gpt", answer)]
        turns = [{"from": who, "value": value} for who, value in turns]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))


def recipe_tree(shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """Return our side's recipe as plain values."""
    parts = ["connector", "language_model", *(["vision_tower"] if shape.train_vision else [])]
    stage = {
        "name": STAGE,
        "trainable": dict.fromkeys(parts, LEARNING_RATE),
        "data": {"sources": [{"name": "data", "path": str(folder / "data.json")}]},
        "packed": True,
        "training": {
            "per_device_train_batch_size": shape.batch_size,
            "max_steps": steps,
            "save_strategy": "no",
            "logging_steps": 1,
        },
    }
    return {
        "name": "benchmark",
        "output_dir": str(folder / "run"),
        "num_threads": 1,
        "model": {"checkpoint": str(folder / "ours")},
        "stages": [stage],
    }


class Meter(TrainerCallback):
    """Notes each step's loss and times, and the peak of memory in the steps."""

    def __init__(self, measured: Measured, before: int) -> None:
        """`before`: bytes that the process held before there was a model."""
        self.measured, self.before = measured, before
        self.mark = (0.0, 0.0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin with the first step."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak of what follows
        self.mark = time.process_time(), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a step; loading its records belongs to it."""
        now = time.process_time(), time.perf_counter()
        self.measured.cpu_seconds.append(now[0] - self.mark[0])
        self.measured.wall_seconds.append(now[1] - self.mark[1])
        self.mark = now

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        """Note the loss."""
        if "loss" in logs:
            self.measured.losses.append(logs["loss"])
        self.mark = time.process_time(), time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Read the peak."""
        self.measured.peak_bytes = resident("VmHWM") - self.before


def resident(name: str) -> int:
    """Return a line of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def train_ours(shape: Shape, folder: Path, steps: int, *callbacks: TrainerCallback) -> Measured:
    """Train a recipe from our checkpoint."""
    from train.arguments import training_arguments
    from train.loop import make_trainer
    from train.manifest import StageManifest
    from train.parts import stage_parts
    from train.process import seed_everything, set_up_torch
    from train.recipe import parse_recipe
    from train.run import freeze_stage

    recipe = parse_recipe(recipe_tree(shape, folder, steps), "benchmark")
    stage, out = recipe.stage(STAGE), folder / "run" / STAGE
    out.mkdir(parents=True, exist_ok=True)
    gc.collect()
    measured, before = Measured(), resident("VmRSS")
    set_up_torch(recipe)
    seed_everything(recipe.seed)
    parts = stage_parts(recipe, stage, None, None)
    groups = freeze_stage(recipe, stage, parts.model)
    arguments = training_arguments(recipe, stage, out)
    manifest = StageManifest(out, recipe, stage, arguments.device)
    trainer = make_trainer(stage, out, parts, groups, arguments, manifest, recipe.seed)
    trainer.add_callback(Meter(measured, before))

    class Waiting(TrainerCallback):
        """Notes how long each step waited for the loader."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured.waited.append(trainer.window.waited)

    for callback in (Waiting(), *callbacks):
        trainer.add_callback(callback)
    trainer.train()
    return measured
