"""How is the base language model trained? On text alone: what follows from what was seen.

vlm base language-model --out runs/quickstart/base/language_model

Shapes: B documents, L tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from train.base.corpus import Document, documents
from train.base.settings import BaseSettings, done_before, finish, fit
from train.base.tokenizer import END, START, train_tokenizer
from vlm.chat_templates import load as load_chat_template

HELD_OUT = 1_000_000_000  # batches from here on are for measuring
TOKENIZER_SCENES = 1500
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(BaseSettings):
    """What is trained: `llama` are fields of transformers.LlamaConfig.

    Attributes:
        shares: how often a document of each kind is kept; even shares would be mostly counting.
    """

    llama: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


class TextBatches(Dataset):
    """Item i is batch i, made from its own seed: any batch can be had without the ones before."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return pad([self.encode(document) for document in self.documents(index)])

    def documents(self, index: int) -> list[Document]:
        """Return the documents of batch `index`."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, index])
        seed = int(rng.integers(1 << 62))
        kept = [
            document
            for document in documents(seed, settings.batch_size)
            if rng.random() < settings.shares[document.task]
        ]
        order = rng.permutation(len(kept))[: settings.batch_size]
        return [kept[i] for i in order]

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """Return ids and labels of a document; only what is learnt has labels."""
        head = f"{START}user\n{document.prompt}{END}\n{START}assistant\n{document.given}"
        given = self.tokenizer(head, add_special_tokens=False)["input_ids"]
        learnt = self.tokenizer(document.learnt + END, add_special_tokens=False)["input_ids"]
        return given + learnt, [IGNORE] * len(given) + learnt


def pad(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pad on the right; a causal model needs no attention mask for that.

    The id that fills up does not matter: nothing that is learnt comes after it.
    """
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([lab + [IGNORE] * (length - len(lab)) for _, lab in rows]),
    }


def train_language_model(settings: LanguageModelSettings, out: Path) -> dict[str, Any]:
    """Train tokenizer and model, write both to `out` and return the report.

    Raises:
        UserError: `out` holds a model of other settings.
    """
    report = done_before(out, settings)
    if report is not None:
        return report
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(
        f"{START}user\n{d.prompt}{END}\n{START}assistant\n{d.given}{d.learnt}{END}\n"
        for d in documents(settings.seed, TOKENIZER_SCENES)
    )
    tokenizer.chat_template = load_chat_template("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        **settings.llama,
    )
    model = LlamaForCausalLM(config)
    data = TextBatches(tokenizer, settings)
    seconds = fit(model, data, settings, out, "base language model")
    figures = measure(model, data)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    return finish(out, settings, {"held_out": figures, "parameters": size, "seconds": seconds})


@torch.no_grad()
def measure(model: LlamaForCausalLM, data: TextBatches, batches: int = 20) -> dict[str, float]:
    """Return, per kind of document, how often the last learnt token (the letter) is right.

    The tokens before it are given, as they are in training.
    """
    model.eval()
    right: dict[str, list[bool]] = {}
    for index in range(HELD_OUT, HELD_OUT + batches):
        kinds = [document.task for document in data.documents(index)]
        batch = data[index]
        guesses = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
        for row, kind in enumerate(kinds):
            known = (batch["labels"][row, 1:] != IGNORE).nonzero().flatten()
            letter = known[-2]  # the last one is the end of the turn
            hit = guesses[row, letter] == batch["labels"][row, 1:][letter]
            right.setdefault(kind, []).append(bool(hit))
    return {kind: round(float(np.mean(hits)), 4) for kind, hits in sorted(right.items())}
