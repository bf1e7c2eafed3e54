"""How long are a stage's rows? Measured on its first records where they are here, else assumed."""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from data_recipes.dataset import ConversationDataset
from data_recipes.image_files import shown_size
from data_recipes.mixture import Mixture
from data_recipes.readers import data_files, open_records
from train.data import longest_record
from train.packing import Packing, best_fit
from train.planning.step import Pack, Sample, plan_views
from train.recipe import StageRecipe
from vlm.chat_templates import load
from vlm.errors import UserError
from vlm.processing import VlmProcessor
from vlm.tiling import Size
from vlm.video_times import ShownVideo

TEXT_TOKENS = 128


@dataclass(frozen=True)
class Lengths:
    """A stage's rows.

    Attributes:
        mean: what a row is on average; time is counted on it.
        longest: what memory must hold.
        origin: a sentence that says where both are from.
        records: how many share a row, on average.
    """

    mean: Sample | Pack
    longest: Sample | Pack
    origin: str
    records: float = 1.0


def assumed_lengths(
    model: Any,
    image_sizes: Sequence[Size],
    text_tokens: int | None,
    max_length: int | None,
) -> Lengths:
    """Return rows of one image and some text.

    Args:
        model: the skeleton; its tiling and connector count the image's tokens.
        image_sizes: (width, height); the mean row has the middle one by tokens, the longest the
            one of most tokens.
        text_tokens: of a row; None: an assumption.
        max_length: what the longest row is filled up to; None: no row is.
    """
    tokens = {size: image_tokens(model, (size,)) for size in image_sizes}
    most = max(tokens.values()) + 1 if max_length is None else max_length
    fitting = sorted((size for size in tokens if tokens[size] < most), key=lambda s: tokens[s])
    if not fitting:
        size = min(tokens, key=lambda s: tokens[s])
        raise UserError(
            f"an image of {size[0]}x{size[1]} takes {tokens[size]} tokens, which leaves no text in "
            f"max_length {max_length}; raise it, or choose a tiling or connector with fewer tokens"
        )
    middle, largest = fitting[(len(fitting) - 1) // 2], fitting[-1]
    text = TEXT_TOKENS if text_tokens is None else text_tokens
    rest = text if max_length is None else max_length - tokens[largest]
    origin = f"{text} text tokens, half of them supervised, and one image a row"
    origin += " (assumed)" if text_tokens is None else " (as given)"
    if max_length is not None:
        origin += f"; the longest is filled up to max_length {max_length}"
    if too_large := [f"{w}x{h}" for w, h in tokens if (w, h) not in fitting]:
        origin += f", which images of {', '.join(too_large)} exceed"
    return Lengths(_row_of(middle, text), _row_of(largest, rest), origin)


def pack_assumed(model: Any, assumed: Lengths, packing: Packing) -> Lengths:
    """Return rows filled with assumed ones, as many of mean length as of the longest.

    Rows are full at most: real records are of all lengths, so the fullest row has more text.

    Raises:
        UserError: a row has no room for the longest.
    """
    samples = [sample for sample in (assumed.mean, assumed.longest) if isinstance(sample, Sample)]

    def num_tokens(sample: Sample) -> int:
        return sample.text_tokens + image_tokens(model, sample.image_sizes)

    most = max(map(num_tokens, samples))
    if most > packing.length:
        raise UserError(
            f"a record takes {most} tokens, more than packed.length {packing.length}; raise it, "
            "or choose a tiling or connector with fewer tokens"
        )
    packs = filled_lengths(samples, num_tokens, packing)
    assert isinstance(packs.longest, Pack)
    *others, last = packs.longest.documents
    room = packing.length - sum(map(num_tokens, packs.longest.documents))
    text, supervised = last.text_tokens + room, last.supervised_tokens + room // 2
    full = Pack((*others, replace(last, text_tokens=text, supervised_tokens=supervised)))
    return replace(packs, longest=full, origin=f"{packs.origin}, the fullest to all of it")


def filled_lengths(
    samples: Sequence[Sample], num_tokens: Callable[[Sample], int], packing: Packing
) -> Lengths:
    """Return rows that are filled best-fit with records such as these, over and over.

    Args:
        samples: each of at most `packing.length` tokens.
        num_tokens: of a sample, images included.
        packing: how rows are filled.
    """
    window = list(islice(cycle(samples), max(packing.window, len(samples))))
    tokens = [num_tokens(sample) for sample in window]
    rows = best_fit(tokens, packing.length)
    filled = [sum(tokens[record] for record in row) for row in rows]
    pairs = [sum(tokens[record] ** 2 for record in row) for row in rows]
    mean = sum(filled) / len(rows), sum(pairs) / len(rows)

    def strange(row: int) -> float:
        """Return how far a row is from the mean in what decides its cost."""
        return abs(filled[row] / mean[0] - 1) + abs(pairs[row] / mean[1] - 1)

    numbers = range(len(rows))
    typical, fullest = min(numbers, key=strange), max(numbers, key=lambda row: filled[row])
    mean_pack, full_pack = (Pack(tuple(window[i] for i in rows[n])) for n in (typical, fullest))
    share = mean[0] / packing.length
    origin = f"; best fit fills rows of {packing.length} tokens to {share:.1%}"
    return Lengths(mean_pack, full_pack, origin, len(window) / len(rows))


def _row_of(size: Size, text: int) -> Sample:
    return Sample((size,), text, (text + 1) // 2)


def image_tokens(model: Any, sizes: tuple[Size, ...]) -> int:
    """Return the tokens of images that come together."""
    return plan_views(model, Sample(sizes, 0, 0))[1]


def count_records(stage: StageRecipe, seed: int) -> int | None:
    """Return the records of an epoch, or None where a file is not here."""
    sources = stage.data.sources
    if not all(file.is_file() for source in sources for file in data_files(source.path)):
        return None
    return len(Mixture(sources, [len(open_records(source.path)) for source in sources], seed))


def measured_lengths(
    stage: StageRecipe,
    processor: VlmProcessor,
    seed: int,
    num_records: int,
    micro_batch: int,
    positions: int | None = None,
) -> Lengths | None:
    """Return the mean and the longest of the first records, pictures' headers read.

    Records longer than the language model's `positions` are left out, as those above max_length.
    Packed rows share a micro-batch, so there the mean of the heaviest one stands for the longest.
    None where no record can be used; `vlm data check` says why.
    """
    processor = copy(processor)  # other stages have other templates
    if stage.chat_template is not None:
        processor.chat_template = load(stage.chat_template)
    dataset = ConversationDataset(stage.data.sources, processor, seed)
    number = min(num_records, len(dataset))
    most = longest_record(stage, positions) or sys.maxsize
    found = [_row(dataset, processor, position) for position in range(number)]
    rows = [row for row in found if row is not None and _length(processor, row) <= most]
    if not rows:
        return None
    batches = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    batches = [batch for batch in batches if len(batch) == micro_batch] or batches
    heaviest = [max(rows, key=lambda row: _length(processor, row))]
    if stage.packed:
        heaviest = max(batches, key=lambda batch: sum(_length(processor, row) for row in batch))
    origin = f"mean and longest of {len(rows)} records (--measure N looks at more)"
    if stage.packing is not None:
        packs = filled_lengths(rows, lambda row: _length(processor, row), stage.packing)
        return replace(
            packs, origin=f"{len(rows)} records (--measure N looks at more){packs.origin}"
        )
    return Lengths(mean_sample(processor, rows), mean_sample(processor, heaviest), origin)


def mean_sample(processor: VlmProcessor, rows: Sequence[Sample]) -> Sample:
    """Return a sample of mean text and as many images and frames as rows have on average.

    Each image is the middle one by tokens; all frames are of one video.
    """
    sizes = sorted(
        (size for row in rows for size in row.image_sizes), key=processor.image_processor.num_tokens
    )
    images = [sizes[len(sizes) // 2]] * round(len(sizes) / len(rows)) if sizes else []
    frames = round(sum(sum(row.frames) for row in rows) / len(rows))
    return Sample(
        tuple(images),
        round(sum(row.text_tokens for row in rows) / len(rows)),
        round(sum(row.supervised_tokens for row in rows) / len(rows)),
        (frames,) if frames else (),
    )


def _row(dataset: ConversationDataset, processor: VlmProcessor, position: int) -> Sample | None:
    """Return the record at `position` as a sample, None if it cannot be used."""
    number, row = dataset.mixture.locate(position)
    try:
        record = dataset.record(number, row)
        shown = [shown_size(file) for file in dataset.files(record, number)]
        tokens, supervised = processor.count_tokens(record.messages, shown)
    except UserError:
        return None
    sizes = tuple(size for size in shown if not isinstance(size, ShownVideo))
    frames = tuple(item.num_frames for item in shown if isinstance(item, ShownVideo))
    sample = Sample(sizes, 0, supervised, frames)
    return replace(sample, text_tokens=tokens - _length(processor, sample))


def _length(processor: VlmProcessor, row: Sample) -> int:
    """Return a row's tokens, images and videos included."""
    of = processor.image_processor
    images = sum(of.num_tokens(size, len(row.image_sizes)) for size in row.image_sizes)
    any_size = (1, 1)  # of frames, whose tokens it does not change
    videos = sum(of.num_tokens_of_grid(any_size, (0, frames)) for frames in row.frames)
    return row.text_tokens + images + videos
