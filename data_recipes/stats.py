"""How long are a mixture's records, how many pictures do they show, and who has which share of it?

Lengths are those of the rows that training makes: tokens of the chat template and of every picture,
counted from headers, without decoding one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data_recipes.dataset import ConversationDataset
from data_recipes.image_files import shown_size
from vlm.errors import UserError

HEAD = (
    *("source", "records", "epoch", "share", "read", "faults", "images", "videos", "tokens"),
    *("95 %", "longest", "supervised", "share of these", "too long"),
)


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """What was found in one source.

    Attributes:
        name: the source's.
        records: of its files.
        per_epoch: records of it in an epoch.
        faults: records read that cannot be used; they are in none of the three below.
        tokens: (n,) length of each record.
        supervised: (n,) how many of its tokens are learnt.
        images: (n,) its pictures.
        videos: of all of them together.
    """

    name: str
    records: int
    per_epoch: int
    faults: int
    tokens: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    videos: int = 0

    @property
    def read(self) -> int:
        """Records that were read."""
        return len(self.tokens) + self.faults

    def per_record(self, values: np.ndarray) -> float:
        """Return the sum of something over a whole epoch, from its mean in what was read."""
        return self.per_epoch * float(values.sum()) / max(1, self.read)


def chosen(size: int, limit: int, seed: int) -> np.ndarray:
    """Return positions of the first epoch: all of `size`, or `limit` drawn evenly, in order."""
    if size <= limit:
        return np.arange(size)
    return np.sort(np.random.default_rng([seed, size]).choice(size, limit, replace=False))


def collect(dataset: ConversationDataset, limit: int) -> list[SourceStats]:
    """Return what records of the first epoch hold, by source; at most `limit` are read."""
    mixture = dataset.mixture
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in mixture.sources]
    faults = [0] * len(mixture.sources)
    positions = chosen(len(dataset), limit, mixture.seed)
    for position in tqdm(positions.tolist(), unit="record", leave=False):
        number, row = mixture.locate(position)
        try:
            found[number].append(measure(dataset, number, row))
        except UserError:
            faults[number] += 1
    tables = [np.array(rows, dtype=np.int64).reshape(-1, 4) for rows in found]
    return [
        SourceStats(
            name=source.name,
            records=mixture.lengths[number],
            per_epoch=mixture.counts[number],
            faults=faults[number],
            tokens=tables[number][:, 0],
            supervised=tables[number][:, 1],
            images=tables[number][:, 2],
            videos=int(tables[number][:, 3].sum()),
        )
        for number, source in enumerate(mixture.sources)
    ]


def measure(dataset: ConversationDataset, number: int, row: int) -> tuple[int, int, int, int]:
    """Return tokens, supervised tokens, pictures and videos of a record, without decoding these.

    Raises:
        UserError: the record cannot be used.
    """
    record = dataset.record(number, row)
    shown = [shown_size(file) for file in dataset.files(record, number)]
    tokens, supervised = dataset.processor.count_tokens(record.messages, shown)
    return tokens, supervised, len(record.images), len(record.videos)


def table(stats: Sequence[SourceStats], max_length: int | None = None) -> str:
    """Return the findings as a table, a line a source; shares are of an epoch.

    Args:
        stats: by source.
        max_length: of the stage; longer records are counted.
    """
    size = sum(each.per_epoch for each in stats)
    learnt = sum(each.per_record(each.supervised) for each in stats)
    lines: list[tuple[str, ...]] = [HEAD]
    for each in stats:
        line = [each.name, f"{each.records:,}", f"{each.per_epoch:,}"]
        line += [f"{each.per_epoch / size:.1%}", f"{each.read:,}", f"{each.faults:,}"]
        if len(each.tokens):
            line += [f"{each.images.mean():.2f}", f"{each.videos / len(each.tokens):.2f}"]
            line += [f"{each.tokens.mean():.0f}"]
            line += [f"{np.percentile(each.tokens, 95):.0f}", f"{each.tokens.max()}"]
            line += [f"{each.supervised.mean():.0f}"]
            line += [f"{each.per_record(each.supervised) / max(1, learnt):.1%}"]
            longer = int((each.tokens > max_length).sum()) if max_length is not None else None
            line += ["-" if longer is None else f"{longer:,}"]
        lines.append((*line, *["-"] * (len(HEAD) - len(line))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if place == 0 else word.rjust(width)
            for place, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def summary(stats: Sequence[SourceStats]) -> str:
    """Return how much was read of how much."""
    read, size = sum(each.read for each in stats), sum(each.per_epoch for each in stats)
    if read == size:
        return f"every record of an epoch was read: {size:,}"
    return f"{read:,} of an epoch's {size:,} records were read, drawn at random (--limit)"
