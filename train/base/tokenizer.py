"""How does the base language model cut text? A byte-level BPE whose merges cross word borders.

CV-Bench's wording repeats, so whole phrases become tokens and a question takes about 20 instead of
60. Words that carry the answer (names, colours, numbers, letters) stay tokens of their own, so that
they can be looked up and copied.
"""

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_recipes.scenes.questions import LETTERS
from data_recipes.scenes.vocabulary import (
    BOX_NAMES,
    COLOR_NAMES,
    NUM_CELLS,
    NUM_DEPTH_BINS,
    NUM_DISTANCE_BINS,
    PLURALS,
    SHAPES,
)

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
RELATIONS = ("left", "right", "above", "below")
VOCABULARY = 768


def answer_words() -> list[str]:
    """Return the words that must stay tokens of their own, longest first."""
    axes = {"x": NUM_CELLS, "y": NUM_CELLS, "z": NUM_DEPTH_BINS, "d": NUM_DISTANCE_BINS}
    axes |= {f"d{axis}": axes[axis] for axis in "xyz"}
    bins = [f"{axis}{i}" for axis, num in axes.items() for i in range(num)]
    numbers = [str(i) for i in range(10)]
    words = {*SHAPES, *PLURALS.values(), *COLOR_NAMES, *BOX_NAMES[1:], *RELATIONS, *bins, *numbers}
    return sorted(words, key=lambda word: (-len(word), word))


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the texts; any other text is spelt in bytes."""
    letters = f"[{LETTERS}]"
    pieces = rf"\n\({letters}\)|\s?\({letters}\)|\s?,|\s?\b(?:{'|'.join(answer_words())})\b"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rare = (f" {word}" for word in answer_words())  # the texts may lack some
    tokenizer.train_from_iterator(chain(texts, rare), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
