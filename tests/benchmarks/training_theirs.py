"""How does transformers train: its class, its processor, a collator that pads, its own Trainer?

Given for nothing: which tokens are learnt is known beforehand, and not looked for in the ids.
"""

import vlm  # noqa: F401  # isort: skip - before transformers: it mends torchvision's import

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from training_sides import (
    HALF,
    LEARNING_RATE,
    PATCH_SIZE,
    VIEW_SIZE,
    Measured,
    Meter,
    Shape,
    pinpoints,
    resident,
)


class Rows(torch.utils.data.Dataset):
    """Records in our order: text, picture, and how many of its last tokens are learnt."""

    def __init__(self, folder: Path) -> None:
        rows = json.loads((folder / "data.json").read_text())
        self.rows = [rows[row] for row in json.loads((folder / "order.json").read_text())]
        self.folder = folder

    def __len__(self) -> int:
        """Number of records."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return text, picture and the number of tokens to learn."""
        row = self.rows[index]
        question, answer = (turn["value"] for turn in row["conversations"])
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        picture = Image.open(self.folder / row["image"]).convert("RGB")
        return {"text": text, "picture": picture, "learnt": len(answer.split()) + 1}


@dataclass(frozen=True)
class PaddingCollator:
    """Run transformers' processor on rows and pad them; labels are those of the last tokens."""

    processor: Any

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch."""
        batch = self.processor(
            images=[row["picture"] for row in rows],
            text=[row["text"] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for label, ids, mask, row in zip(
            labels, batch["input_ids"], batch["attention_mask"], rows, strict=True
        ):
            end = int(mask.sum())
            label[end - row["learnt"] : end] = ids[end - row["learnt"] : end]
        return {**batch, "labels": labels}


def their_processor(folder: Path, backend: str) -> Any:
    """Return transformers' processor; pictures are cut by PIL (LLaVA's numbers) or torchvision."""
    from transformers import (
        AutoTokenizer,
        LlavaNextImageProcessor,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    kind: Any = LlavaNextImageProcessorPil if backend == "pil" else LlavaNextImageProcessor
    images = kind(
        size={"shortest_edge": VIEW_SIZE},
        crop_size={"height": VIEW_SIZE, "width": VIEW_SIZE},
        image_grid_pinpoints=pinpoints(),
        image_mean=HALF,
        image_std=HALF,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "theirs", padding_side="right")
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def train_theirs(shape: Shape, folder: Path, steps: int, backend: str = "torchvision") -> Measured:
    """Train transformers' class with its processor and Trainer."""
    from transformers import LlavaNextForConditionalGeneration, Trainer, TrainingArguments

    gc.collect()
    measured, before = Measured(), resident("VmRSS")
    torch.set_num_threads(1)

    class TimedTrainer(Trainer):
        """Notes how long each step waited for the loader; nothing else is changed."""

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            batches = super().get_batch_samples(*args, **kwargs)
            measured.waited.append(time.perf_counter() - start)
            (batch,) = batches[0]
            measured.tokens.append(int((batch["labels"] != -100).sum()))
            measured.places.append(batch["labels"].numel())
            measured.padding.append(1 - float(batch["attention_mask"].float().mean()))
            return batches

    model: Any = LlavaNextForConditionalGeneration.from_pretrained(
        folder / "theirs", dtype=torch.float32
    )
    model.model.vision_tower.requires_grad_(shape.train_vision)
    arguments = TrainingArguments(
        output_dir=str(folder / "their_run"),
        per_device_train_batch_size=shape.batch_size,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(folder),
        data_collator=PaddingCollator(their_processor(folder, backend)),
        callbacks=[Meter(measured, before)],
    )
    trainer.train()
    return measured
