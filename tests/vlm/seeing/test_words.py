"""Are tokens put together to the words of an answer?"""

from itertools import pairwise

import pytest

from vlm.seeing.words import words_of


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A red ball.", ["A", "red", "ball."]),
        ("  two\n\nlines ", ["two", "lines"]),
        ("(B)", ["(B)"]),
        ("红球 und Über", ["红", "球", "und", "Über"]),
        ("", []),
        ("   ", []),
    ],
)
def test_words_cover_their_bytes(make_tokenizer, text, wanted):
    tokenizer = make_tokenizer()  # a token is a byte
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = words_of(tokenizer, [*ids, tokenizer.eos_token_id])
    assert [word.text for word in words] == wanted
    for word in words:
        assert word.text in tokenizer.decode(ids[word.start : word.stop])
    assert all(a.stop <= b.start for a, b in pairwise(words))
    assert not words or words[-1].stop <= len(ids), "the end of the turn is no part of a word"
