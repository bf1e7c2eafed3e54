"""What are a conversation's tokens, and which of them are learnt?

What a person types must not end its own turn or open another: where a conversation is to be
answered, the special tokens that do so (those that the template writes around contents, and those
that the tokenizer has a name for, such as its end) are plain text in contents, as transformers'
`split_special_tokens` makes them. Others, such as those of boxes, stay tokens: models are trained
on them. In conversations to learn from all stay tokens; `vlm data check` counts them.

Surprise: tokenizers read special tokens in a text all alike, wherever they stand. Hence a copy that
reads none, and stand-ins for those that are meant: every one keeps its place and its neighbours, so
that the rest of the text is cut as ever. It takes half a second at 150,000 tokens, where a text
names such a token. Turns that a template marks with words ("USER:") can be imitated all the same.

Shapes: L tokens.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from vlm.conversations import render, tokens_in_spans
from vlm.errors import UserError

PRIVATE_USE = range(0xE000, 0xF900)  # Unicode gives these characters no meaning


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[dict[str, Any]],
    image_token: str,
    supervise: bool,
    add_generation_prompt: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a conversation's ids (L,) and, if supervised, whether each is the assistant's (L,).

    Args:
        tokenizer: a fast one.
        template: Jinja.
        messages: checked, with image entries alone, each of which becomes one image token.
        image_token: as text.
        supervise: it is to learn from, and what the assistant says is marked.
        add_generation_prompt: end with the opening of an assistant turn.

    Raises:
        UserError: the template cannot take the conversation, or the tokenizer cannot read a special
            token as text.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    rest = (template, special, image_token, supervise, add_generation_prompt)
    if supervise:
        rendered = render(messages, *rest)
        tokens = _tokenize(tokenizer, rendered.text, return_offsets_mapping=True)
        inside = tokens_in_spans(tokens["offset_mapping"], rendered.spans)
        return np.asarray(tokens["input_ids"], dtype=np.int64), inside
    known = tuple(tokenizer.all_special_tokens)
    guarded = _turn_tokens(known, tuple(special.items()), template, image_token)
    texts = _texts(messages)
    named = [token for token in guarded if any(token in text for text in texts)]
    if not named:
        ids = _tokenize(tokenizer, render(messages, *rest).text)["input_ids"]
        return np.asarray(ids, dtype=np.int64), None
    stand_ins = _stand_ins(tokenizer, messages, template)
    hidden = _replace_in(messages, {token: stand_ins[token] for token in named})
    text = render(hidden, *rest).text
    return _read_hidden_as_text(tokenizer, text, stand_ins), None


def _tokenize(tokenizer: Any, text: str, **options: bool) -> Mapping[str, Any]:
    return tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
    )


@lru_cache(maxsize=8)
def _turn_tokens(
    known: tuple[str, ...], special: tuple[tuple[str, str], ...], template: str, image_token: str
) -> tuple[str, ...]:
    """Return which of a tokenizer's special tokens have a name, or stand around contents."""
    said = [{"type": "text", "text": "probe"}]
    turns = [{"role": role, "content": said} for role in ("system", "user", "assistant")]
    written = "".join(token for _, token in special)
    for messages in (turns, turns[1:]):
        try:
            written += render(messages, template, dict(special), image_token, False, True).text
        except UserError:
            continue  # it knows no system turns
    return tuple(token for token in known if token in written and token != image_token)


def _texts(messages: Sequence[dict[str, Any]]) -> list[str]:
    """Return the texts of all contents; an image token stands in none (`check_messages`)."""
    return [e["text"] for m in messages for e in m["content"] if e["type"] == "text"]


def _stand_ins(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str
) -> dict[str, str]:
    """Return a text for each special token that stands nowhere in the conversation.

    Raises:
        UserError: there is no character to make them of.
    """
    written = "".join([template, *_texts(messages), *tokenizer.all_special_tokens])
    mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in written), None)
    if mark is None:
        raise UserError("the text holds all characters of Unicode's private use; leave one out")
    return {token: f"{mark}{n}{mark}" for n, token in enumerate(tokenizer.all_special_tokens)}


def _replace_in(
    messages: Sequence[dict[str, Any]], words: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return messages with words of their texts replaced."""
    return [
        {
            **message,
            "content": [
                {**e, "text": _replace(e["text"], words)} if e["type"] == "text" else e
                for e in message["content"]
            ],
        }
        for message in messages
    ]


def _replace(text: str, words: Mapping[str, str]) -> str:
    """Return a text with words replaced at once; of words that begin alike the longest is meant."""
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(pattern, lambda found: words[found[0]], text)


def _read_hidden_as_text(tokenizer: Any, text: str, stand_ins: Mapping[str, str]) -> np.ndarray:
    """Return the ids of a text in which stand-ins stand for tokens that are but text."""
    known = tokenizer.added_tokens_decoder
    ids = {str(token): number for number, token in known.items()}
    cutter = copy.deepcopy(tokenizer.backend_tokenizer)
    cutter.no_padding()
    cutter.no_truncation()
    cutter.encode_special_tokens = True  # as text
    for token, stand_in in stand_ins.items():
        as_it_is = known[ids[token]]
        same = {"lstrip": as_it_is.lstrip, "rstrip": as_it_is.rstrip}
        same["single_word"] = as_it_is.single_word
        cutter.add_tokens([AddedToken(stand_in, normalized=False, special=False, **same)])
    meant = {cutter.token_to_id(stand_in): ids[token] for token, stand_in in stand_ins.items()}
    turned = {**stand_ins, **{stand_in: token for token, stand_in in stand_ins.items()}}
    found = cutter.encode(_replace(text, turned), add_special_tokens=False).ids
    if still := set(found) & set(meant.values()):
        token = tokenizer.convert_ids_to_tokens(still.pop())
        raise UserError(
            f"the text holds {token!r}, which this tokenizer reads as the token alone; write it "
            "otherwise"
        )
    return np.asarray([meant.get(number, number) for number in found], dtype=np.int64)
