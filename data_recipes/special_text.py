"""Which special tokens of language models does a record's text name?

A tokenizer that has them reads them as the tokens: `</s>` in an answer teaches the model to stop
there, `<|im_end|>` in a question ends the question. Some records mean it (boxes), most do not (web
pages, code), so it is counted and shown, and no fault.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.errors import UserError
from vlm.hub import check_reach

# As the tokenizers of Llama, Vicuna, Qwen, InternLM, Phi, Gemma, Mistral and GPT-2 write theirs.
USUAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]"
)


def special_tokens_of(model: str) -> re.Pattern[str]:
    """Return what finds the special tokens of a model's or a folder's tokenizer in a text.

    Raises:
        UserError: it has no tokenizer, or cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        check_reach(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {model}: no tokenizer can be loaded from there") from error
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def texts_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all texts of messages whose contents are lists of entries."""
    return [e["text"] for m in messages for e in m["content"] if e["type"] == "text"]


def named_tokens(texts: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    """Return the special tokens that texts name, each once, in order."""
    return list(dict.fromkeys(found for text in texts for found in pattern.findall(text)))
