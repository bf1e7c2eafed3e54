"""How is the base language model trained? On text alone: what follows from what was seen.

vlm base language-model --out runs/quickstart/base/language_model

Shapes: L tokens of all documents of a batch, W words of a bag, E width.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from data_recipes.scenes import questions as ask
from train.base.corpus import KINDS, Document, documents
from train.base.settings import HELD_OUT, BaseSettings, done_before, finish, fit
from train.base.tokenizer import END, START, train_tokenizer
from vlm.chat_templates import load as load_chat_template
from vlm.errors import UserError
from vlm.packed_attention import packed_mask, use_packed_attention

TOKENIZER_SCENES = 1500
# Empty cells told of a scene, at most, drawn for a whole batch, so that little of it is padding; 64
# allows the whole grid, as a picture shows it.
MOST_EMPTY = (8, 8, 8, 64)
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(BaseSettings):
    """What is trained: `llama` are fields of transformers.LlamaConfig.

    Attributes:
        shares: how often a document of each kind is kept; even shares would be mostly counting.
    """

    llama: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse shares that are missing, misspelt or no shares."""
        super().__post_init__()
        if wrong := sorted(set(self.shares) ^ set(KINDS)):
            raise UserError(
                f"shares must name {', '.join(KINDS)}, once each; missing or unknown: {wrong[0]!r}"
            )
        for kind, share in self.shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"shares: {kind} must be from 0 to 1, not {share}")
        if not any(self.shares.values()):
            raise UserError("shares: all are 0, so nothing would be learnt; give one a share")


class TextBatches(Dataset):
    """Item i is batch i, made from its own seed: any batch can be had without the ones before."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self._word_ids: dict[str, int] = {}  # of the few words that tell cells

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return pack([self.encode(document) for document in self.documents(index)])

    def documents(self, index: int) -> list[Document]:
        """Return the documents of batch `index`."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, index])
        kept: list[Document] = []
        while not kept:  # small shares may keep none
            seed = int(rng.integers(1 << 62))
            most_empty = MOST_EMPTY[rng.integers(len(MOST_EMPTY))]
            kept = [
                document
                for document in documents(seed, settings.batch_size, most_empty)
                if rng.random() < settings.shares[document.kind]
            ]
        order = rng.permutation(len(kept))[: settings.batch_size]
        return [kept[i] for i in order]

    def encode(self, document: Document) -> tuple[list[list[int]], list[int]]:
        """Return the bags of ids and the labels of a document; only what is learnt has labels."""
        cells = [self._bag(words) for words in document.cells]
        gap = "\n" if cells else ""
        bags = [*self._ids(f"{START}user\n"), *cells]
        bags += self._ids(f"{gap}{document.prompt}{END}\n{START}assistant\n")
        labels = [IGNORE] * len(bags)
        for text, learnt in (*document.reply, (END, True)):
            piece = self._ids(text)
            bags += piece
            labels += [bag[0] if learnt else IGNORE for bag in piece]
        return bags, labels

    def _ids(self, text: str) -> list[list[int]]:
        """Return text as bags of one."""
        # The tokenizer below transformers', without its options: a fifth of the time of a batch.
        found = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return [[i] for i in found.ids]

    def _bag(self, words: list[str]) -> list[int]:
        return [self._word_ids.get(word) or self._find_word(word) for word in words]

    def _find_word(self, word: str) -> int:
        ((number,),) = self._ids(f" {word}")  # each is one token, see tokenizer.py
        self._word_ids[word] = number
        return number


def pack(rows: list[tuple[list[list[int]], list[int]]]) -> dict[str, Tensor]:
    """Join documents in one row, unpadded.

    Returns:
        bags (1, L, W) of ids, -1 where a bag has fewer than W, labels (1, L), and position_ids
        (1, L), which begin anew with each document.
    """
    bags = [bag for document, _ in rows for bag in document]
    out = np.full((1, len(bags), max(len(bag) for bag in bags)), -1, dtype=np.int64)
    for place, bag in enumerate(bags):
        out[0, place, : len(bag)] = bag
    labels = [label for _, document in rows for label in document]
    positions = [torch.arange(len(document)) for document, _ in rows]
    return {
        "bags": torch.from_numpy(out),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat(positions)[None],
    }


class BagLlama(LlamaForCausalLM):
    """A Llama that reads bags of words: the embedding of a bag is its words' sum."""

    def hidden(self, bags: Tensor, position_ids: Tensor) -> Tensor:
        """Return the last hidden states (1, L, E) of packed bags (1, L, W), see `pack`."""
        words = self.get_input_embeddings()(bags.clamp(min=0))  # (1, L, W, E)
        embeds = (words * (bags >= 0)[..., None]).sum(2)
        mask = packed_mask(self.model, position_ids, None)
        outputs = self.model(inputs_embeds=embeds, position_ids=position_ids, attention_mask=mask)
        return outputs.last_hidden_state

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, bags: Tensor, labels: Tensor, position_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the mean loss of the learnt tokens of packed documents (see `pack`)."""
        learnt = labels[:, 1:] != IGNORE
        logits = self.lm_head(self.hidden(bags, position_ids)[:, :-1][learnt])
        return {"loss": F.cross_entropy(logits, labels[:, 1:][learnt])}


@torch.no_grad()
def start_by_matching(model: LlamaForCausalLM) -> None:
    """Let attention begin by looking for words like its own and copying what it finds.

    Keys start equal to queries, and the output projection as the transpose of the values': the
    mimetic initialisation of Trockman and Kolter (2023, arXiv 2305.09828) without its noise terms.
    From the usual start, looking up a word among the cells is not learnt within the time there is.
    """
    for layer in model.model.layers:
        attention = cast(LlamaDecoderLayer, layer).self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


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
        f"{START}user\n{d.prompt}{END}\n{START}assistant\n{d.text}{END}\n"
        for d in documents(settings.seed, TOKENIZER_SCENES, 0)
    )
    tokenizer.chat_template = load_chat_template("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        **settings.llama,
    )
    model = BagLlama(config)
    use_packed_attention(model.model)
    start_by_matching(model)
    data = TextBatches(tokenizer, settings)
    seconds = fit(model, data, settings, out, "base language model")
    figures = measure(model, data)
    plain = LlamaForCausalLM(config)  # what others load: a Llama like any other
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    return finish(out, settings, {"held_out": figures, "parameters": size, "seconds": seconds})


@torch.no_grad()
def measure(model: BagLlama, data: TextBatches, batches: int = 12) -> dict[str, float]:
    """Return, per kind of document, how often the model's own reply is right.

    The model writes all that it would learn there (the likeliest token each time; seen pieces are
    given). A question's reply is right if its last word, the letter, is; another if all of it is.
    Documents with a scene are called "Relation told" and so on.
    """
    model.eval()
    right: dict[str, list[bool]] = {}
    for index in range(HELD_OUT, HELD_OUT + batches):
        documents = data.documents(index)
        rows = [data.encode(document) for document in documents]
        for document, row, written in zip(documents, rows, write(model, rows), strict=True):
            wanted = [bag[0] for bag, label in zip(*row, strict=True) if label != IGNORE]
            part = slice(-2, None) if document.task in ask.TASKS else slice(None)
            right.setdefault(document.kind, []).append(written[part] == wanted[part])
    return {kind: round(float(np.mean(hits)), 4) for kind, hits in sorted(right.items())}


def write(model: BagLlama, rows: list[tuple[list[list[int]], list[int]]]) -> list[list[int]]:
    """Return what the model writes, greedily, at the places of each row that have labels.

    All places are guessed at once from what stands before them, first the truth and then the
    guesses, until no guess changes: each is then the likeliest after those before it (Jacobi
    decoding, arXiv:2305.10427). Where the model is right, that takes one pass for all tokens.
    """
    bags = [list(row) for row, _ in rows]
    places = [[i for i, label in enumerate(labels) if label != IGNORE] for _, labels in rows]
    starts = np.cumsum([0, *(len(row) for row in bags[:-1])]).tolist()
    slots = [(number, i) for number, place in enumerate(places) for i in place]
    before = [starts[number] + i - 1 for number, i in slots]
    for _ in range(max(map(len, places))):  # after so many passes all are final
        packed = pack([(row, [IGNORE] * len(row)) for row in bags])
        hidden = model.hidden(packed["bags"], packed["position_ids"])[0]
        guesses = model.lm_head(hidden[before]).argmax(-1).tolist()
        known = [bags[number][i][0] for number, i in slots]
        if guesses == known:
            break
        for (number, i), guess in zip(slots, guesses, strict=True):
            bags[number][i] = [guess]
    return [[row[i][0] for i in place] for row, place in zip(bags, places, strict=True)]
