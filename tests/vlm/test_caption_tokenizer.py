"""Are the Q-Former's words those of the captions, whatever their order, and can others be read?"""

import pytest
from transformers import BertTokenizerFast

from vlm.caption_tokenizer import count_caption_tokenizer, load_caption_tokenizer
from vlm.errors import UserError

TEXTS = ["A red ball, a Café", "two red balls", "red cubes"]


def test_words_by_their_number_then_letters():
    tokenizer = count_caption_tokenizer(TEXTS, 35)  # 5 special tokens, 14 letters twice, 2 words
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == 35
    assert [vocabulary[t] for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")] == [0, 1, 2, 3, 4]
    whole = [token for token in vocabulary if len(token.strip("#")) > 1 and token[0] != "["]
    assert whole == ["red", "ball"] or whole == ["ball", "red"]
    assert vocabulary["red"] < vocabulary["ball"]
    assert count_caption_tokenizer(TEXTS[::-1], 35).get_vocab() == vocabulary


def test_text_around_and_words_never_seen():
    tokenizer = count_caption_tokenizer(TEXTS, 100)
    ids = tokenizer("RED bed ½")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["[CLS]", "red", "b", "##e", "##d", "[UNK]", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red bed"


def test_a_limit_below_the_letters_leaves_the_letters():
    assert tokens_of(count_caption_tokenizer(["ab"], 1), "ab") == ["[CLS]", "a", "##b", "[SEP]"]


def tokens_of(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_saved_and_loaded(tmp_path):
    tokenizer = count_caption_tokenizer(TEXTS, 50)
    tokenizer.save_pretrained(tmp_path)
    again = load_caption_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("a red dab")["input_ids"] == tokenizer("a red dab")["input_ids"]
    assert again.bos_token == "[DEC]"


def test_bert_s_gets_one_token_more(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    tokenizer = load_caption_tokenizer(tmp_path)
    assert len(tokenizer) == 8 and tokenizer.bos_token_id == 7
    assert tokens_of(tokenizer, "Reds") == ["[CLS]", "red", "##s", "[SEP]"]


def test_another_kind_of_tokenizer_is_refused(tmp_path, make_tokenizer):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no cls_token"):
        load_caption_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_caption_tokenizer(tmp_path / "nothing")
