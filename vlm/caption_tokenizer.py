"""Which words does a Q-Former read and write? BERT's, or those of the captions themselves.

A text is `[CLS] words [SEP]`; a caption to be written begins with `[DEC]` in `[CLS]`'s place.

Surprise: a vocabulary of our own is counted, not trained by tokenizers' `WordPieceTrainer`, which
numbers its pieces by the order of a hash table and gave another vocabulary in every process. Ours
has the most frequent words whole, and every character, inside a word and at its start, to spell the
others; words and characters are found and put together by `tokenizers` as BERT's uncased are.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm.errors import UserError

PADDING, UNKNOWN, START, END, CAPTION = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"
INSIDE = "##"  # what a piece begins with that does not begin a word


def load_caption_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id, with `[DEC]` added where it has none.

    Raises:
        UserError: it cannot be loaded, or has no tokens for start, end and padding as BERT's has.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the Q-Former's tokenizer {source} cannot be loaded: {reason}") from error
    for name in ("cls_token", "sep_token", "pad_token"):
        if tokenizer.special_tokens_map.get(name) is None:
            raise UserError(
                f"the Q-Former's tokenizer {source} has no {name}; choose one like BERT's, such as "
                "google-bert/bert-base-uncased"
            )
    tokenizer.add_special_tokens({"bos_token": CAPTION})
    return tokenizer


def count_caption_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of the texts' words; the same texts give the same.

    Args:
        texts: captions.
        vocab_size: most tokens; special tokens and characters are there in any case.
    """
    # Typed as Any: tokenizers' stubs know neither these properties nor the classes' arguments.
    normalizer: Any = normalizers.BertNormalizer(lowercase=True)
    splitter: Any = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    letters = sorted({letter for word in counts for letter in word})
    pieces = [PADDING, UNKNOWN, START, END, CAPTION, *letters, *(INSIDE + x for x in letters)]
    longer = [word for word in counts if len(word) > 1]
    longer.sort(key=lambda word: (-counts[word], word))
    pieces += longer[: max(0, vocab_size - len(pieces))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core: Any = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.decoder = decoders.WordPiece(prefix=INSIDE)
    specials = [(token, vocabulary[token]) for token in (START, END)]
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=specials
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        bos_token=CAPTION,
    )
