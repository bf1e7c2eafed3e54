"""Which tokens of an answer make up which of its words?"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Scripts without spaces: each piece of text is a word of its own (kana, CJK, full-width forms).
UNSPACED = (("\u3040", "\u30ff"), ("\u3400", "\u9fff"), ("\uf900", "\ufaff"), ("\uff00", "\uffef"))


@dataclass(frozen=True)
class Word:
    """A word, and the tokens [start, stop) of the answer that it is made of."""

    text: str
    start: int
    stop: int


def words_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[Word, ...]:
    """Return the words of an answer's tokens; special tokens and blanks belong to none."""
    words: list[Word] = []
    told, start = "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(
            list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one answer, not a batch"
        if text.endswith("\ufffd") and end < len(ids):
            continue  # the first bytes of a character whose other bytes are to come
        piece = text[len(told) :]
        if piece and words and not _begins_a_word(piece, told):
            last = words.pop()
            words.append(Word((last.text + piece).lstrip(), last.start, end))
        elif piece:
            words.append(Word(piece.lstrip(), start, end))
        told, start = text, end
    return tuple(Word(word.text.strip(), word.start, word.stop) for word in words if word.text)


def _begins_a_word(piece: str, told: str) -> bool:
    """Return whether a piece of text begins a word, after what was told before it."""
    first = piece[0]
    if any(low <= first <= high for low, high in UNSPACED):
        return True
    return first.isspace() or told[-1:].isspace()
