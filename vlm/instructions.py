"""What does a connector get to read that looks for what is asked for? Each image's instruction.

Shapes: n images, L tokens of the longest of their instructions.

InstructBLIP's Q-Former reads the user's text beside the image, in a vocabulary of its own (BERT's).
An image's instruction is the text of the user's message that it stands in; of an image elsewhere,
the text of the user's message before. What is asked in later turns is not known when the image is
read, in training as in chat, so that a conversation's beginning never changes as it goes on.

Surprise: nothing is cut. LAVIS cuts instructions to their last 128 tokens, which it was trained
with; transformers does not.

Follows `blip2_vicuna_instruct.py` of salesforce/LAVIS and transformers' `InstructBlipProcessor`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from connectors.views import TextSource
from vlm.caption_tokenizer import load_caption_tokenizer
from vlm.errors import UserError

IDS, MASK = "qformer_input_ids", "qformer_attention_mask"  # transformers' names
FOLDER = "qformer_tokenizer"  # beside the language model's tokenizer in a checkpoint


def instructions(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the instruction of each image of checked messages, in order."""
    found, asked = [], ""
    for message in messages:
        if message["role"] == "user":
            texts = [entry["text"].strip() for entry in message["content"] if "text" in entry]
            asked = " ".join(filter(None, texts))
        found += [asked for entry in message["content"] if entry["type"] == "image"]
    return found


def load_tokenizer(source: TextSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a connector names, which then knows the longest text allowed.

    Raises:
        UserError: it names none, it cannot be loaded, or it has more tokens than the connector.
    """
    if source.tokenizer is None:
        raise UserError(
            "the connector reads instructions, whose tokenizer it does not name; set tokenizer in "
            "the connector to a folder or hub id, such as google-bert/bert-base-uncased"
        )
    tokenizer = load_caption_tokenizer(source.tokenizer)
    if len(tokenizer) > source.vocab_size:
        raise UserError(
            f"the Q-Former's tokenizer {source.tokenizer} has {len(tokenizer)} tokens, but the "
            f"connector knows {source.vocab_size}; set its vocab_size, or another tokenizer"
        )
    tokenizer.model_max_length = source.max_length
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return ids and mask (n, L) of instructions, with the tokenizer's special tokens around them.

    Raises:
        UserError: one is too long.
    """
    rows = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    for row, text in zip(rows, texts, strict=True):
        if len(row) > tokenizer.model_max_length:
            raise UserError(
                f"an image's instruction takes {len(row)} tokens of the Q-Former's tokenizer, "
                f"more than its {tokenizer.model_max_length}: {text[:60]!r}...; shorten it"
            )
    return _pad(tokenizer, rows)


def join(
    tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the instructions of several conversations as one (n, L), padded on the right."""
    rows = [
        ids[mask.bool()] for row in encoded for ids, mask in zip(row[IDS], row[MASK], strict=True)
    ]
    return _pad(tokenizer, rows)


def _pad(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return ids of different lengths as ids and mask (n, L)."""
    padding: Any = tokenizer.pad_token_id
    ids = pad_sequence(list(rows), batch_first=True, padding_value=padding)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {IDS: ids, MASK: mask}
