"""Which record stands at position p of epoch e? A pure function of the sources, the seed, e and p.

Every source is an endless sequence: its selected rows in one random order, then in another, and so
on. An epoch takes the next `n` rows of each, so no row comes again before all have come, also over
epochs. `n` follows from `repeat` (times per epoch; 0.5 is a half) or, if the sources have a
`weight`, from its share of all selected rows. The epoch's rows are then shuffled together.

Nothing depends on a global random state, on the rank or on how many workers there are, so a run
that is resumed sees what it would have seen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from connectors.config import config_from_mapping
from data_recipes.foreign_mixes import from_internvl, from_llava_next, is_internvl
from data_recipes.records import ImagePosition
from vlm.errors import UserError
from vlm.frame_files import FRAME_RATE

Take = Literal["first", "end", "random"]
MAX_MIX_BYTES = 1 << 24
MOST_REPEATS = 1000  # an epoch's order is held whole, 8 bytes a record


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of records and how much of it to use.

    Attributes:
        name: what logs and the manifest call it.
        path: JSON array, JSONL, parquet or tar; with braces, several (see `readers`).
        image_root: folder that image paths are relative to; the file's own folder if empty.
        weight: share of the mixture; all sources have one or none has.
        repeat: times per epoch, where there are no weights.
        cap: keep at most so many records, or "10%" of them, rounded up.
        take: which ones `cap` keeps.
        image_position: "first" applies LLaVA's rule to placeholders, "front_if_missing" InternVL's;
            "none" leaves the pictures out (see records.py).
        frame_rate: frames a second of videos that are folders or lists of pictures.
    """

    name: str
    path: str
    image_root: str = ""
    weight: float | None = None
    repeat: float = 1.0
    cap: int | str | None = None
    take: Take = "first"
    image_position: ImagePosition = "as_written"
    frame_rate: float = FRAME_RATE

    def __post_init__(self) -> None:
        where = f"data source {self.name!r}"
        if self.weight is not None and self.weight <= 0:
            raise UserError(f"{where}: weight must be above 0, not {self.weight}")
        if not 0 < self.frame_rate < math.inf:
            raise UserError(f"{where}: frame_rate must be above 0, not {self.frame_rate}")
        if not 0 < self.repeat <= MOST_REPEATS:
            raise UserError(
                f"{where}: repeat must be above 0 and at most {MOST_REPEATS}, not {self.repeat}; "
                "for more, train more epochs"
            )
        if self.weight is not None and self.repeat != 1.0:
            raise UserError(f"{where}: give a weight or a repeat, not both")
        self.num_selected(1)  # says now if `cap` cannot be read

    def num_selected(self, num_records: int) -> int:
        """Return how many of `num_records` the cap keeps."""
        if self.cap is None:
            return num_records
        try:
            text = str(self.cap)
            percent = text.endswith("%")
            value = float(text[:-1]) if percent else int(text)
        except ValueError as error:
            raise UserError(
                f"data source {self.name!r}: cap must be a number of records or a percentage "
                f"such as '10%', not {self.cap!r}"
            ) from error
        if not value > 0 or (percent and value > 100):
            raise UserError(f"data source {self.name!r}: cap {self.cap!r} keeps nothing sensible")
        if percent:
            return math.ceil(num_records * value / 100)
        return min(num_records, int(value))


class Mixture:
    """The order in which several sources' records are seen.

    Args:
        sources: how much of each file to use.
        lengths: number of records of each source's file.
        seed: the run's seed.
    """

    def __init__(self, sources: Sequence[Source], lengths: Sequence[int], seed: int) -> None:
        self.sources = tuple(sources)
        self.lengths = tuple(lengths)
        self.seed = seed
        _check_sources(self.sources)
        self._selected = [
            _select(source, length, seed, number)
            for number, (source, length) in enumerate(zip(sources, lengths, strict=True))
        ]
        self.counts = _epoch_counts(self.sources, [len(rows) for rows in self._selected])
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        """Number of records in one epoch."""
        return sum(self.counts)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (source number, row in its file) at `position`, counted on over all epochs."""
        epoch, offset = divmod(position, len(self))
        code = int(self._epoch_order(epoch)[offset])
        return code >> 40, code & ((1 << 40) - 1)

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return source numbers and rows in their files at positions [start, stop)."""
        codes = self._codes(start, stop)
        return codes >> 40, codes & ((1 << 40) - 1)

    def seen(self, start: int, stop: int) -> dict[str, int]:
        """Return how many records of each source stand at positions [start, stop)."""
        counts = np.bincount(self._codes(start, stop) >> 40, minlength=len(self.sources))
        names = [source.name for source in self.sources]
        return dict(zip(names, counts.tolist(), strict=True))

    def times_seen(self, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """Return how often each (source number, row) stands at positions of [start, stop) spans.

        They come in the order of source and row.
        """
        codes = np.concatenate([np.zeros(0, np.int64), *(self._codes(*span) for span in spans)])
        found, counts = np.unique(codes, return_counts=True)
        places = zip((found >> 40).tolist(), (found & ((1 << 40) - 1)).tolist(), strict=True)
        return dict(zip(places, counts.tolist(), strict=True))

    def _codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes (see `_epoch_order`) at positions [start, stop)."""
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, len(self))
            parts.append(self._epoch_order(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return one epoch as codes: source number in the high bits, row in the low 40."""
        if epoch != self._epoch:
            self._order = np.zeros(0, dtype=np.int64)  # two epochs need not be held at once
            order, filled = np.empty(len(self), dtype=np.int64), 0
            for number, count in enumerate(self.counts):
                own = order[filled : filled + count]
                self._draw(number, epoch * count, own)
                own |= number << 40
                filled += count
            np.random.default_rng([self.seed, 2, epoch]).shuffle(order)
            self._order, self._epoch = order, epoch
        return self._order

    def _draw(self, number: int, start: int, drawn: np.ndarray) -> None:
        """Fill `drawn` with what source `number`'s endless sequence of rows has from `start` on."""
        filled = 0
        while filled < len(drawn):
            rows = np.array(self._selected[number], dtype=np.int64)
            cycle, offset = divmod(start + filled, len(rows))
            np.random.default_rng([self.seed, 1, number, cycle]).shuffle(rows)
            piece = rows[offset : offset + len(drawn) - filled]
            drawn[filled : filled + len(piece)] = piece
            filled += len(piece)


def load_mix(path: str | Path, image_root: str = "") -> list[Source]:
    """Read a mix file: YAML with one key, `sources`, a list of `Source` fields.

    LLaVA-NeXT's YAML and InternVL's JSON are read too, see `foreign_mixes`.

    Args:
        path: the file.
        image_root: of sources that name none.

    Raises:
        UserError: the file is missing, is no YAML, or has a field that `Source` does not know.
    """
    path, where = Path(path), f"mix {path}"
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: is no YAML ({' '.join(str(error).split())})") from error
    if is_internvl(tree):
        values = from_internvl(tree, where)
    elif isinstance(tree, Mapping) and set(tree) == {"datasets"}:
        values = from_llava_next(tree["datasets"], where)
    elif isinstance(tree, Mapping) and set(tree) == {"sources"}:
        values = tree["sources"]
    else:
        raise UserError(
            f"{where}: must have the one key 'sources' (or 'datasets', as LLaVA-NeXT, or names "
            "with root and annotation, as InternVL)"
        )
    sources = parse_sources(values, str(path))
    return [s if s.image_root else replace(s, image_root=image_root) for s in sources]


def is_mix(path: Path) -> bool:
    """Return whether a file is a mix rather than records: YAML, or InternVL's JSON."""
    if path.suffix != ".json" or not path.is_file():
        return path.suffix in (".yaml", ".yml")
    with path.open("rb") as file:
        if file.read(64).lstrip()[:1] != b"{" or path.stat().st_size > MAX_MIX_BYTES:
            return False
        file.seek(0)
        try:
            return is_internvl(json.load(file))
        except ValueError:
            return False  # JSONL


def parse_sources(values: Any, where: str) -> list[Source]:
    """Turn a list of mappings into sources; `where` names the list in errors."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: sources must be a list with at least one source")
    return [_parse_source(value, f"{where}: source {n}") for n, value in enumerate(values, 1)]


def _parse_source(value: Any, where: str) -> Source:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping with the keys name and path, not {value!r}")
    return config_from_mapping(Source, value, where)


def _check_sources(sources: Sequence[Source]) -> None:
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two data sources are named {twice[0]!r}; give each its own name")
    weighted = [source.name for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(name for name in names if name not in weighted)
        raise UserError(
            f"data source {bare!r} has no weight, but others have; give all or none one"
        )


def _select(source: Source, num_records: int, seed: int, number: int) -> range | np.ndarray:
    """Return the row numbers the cap keeps, in file order."""
    count = source.num_selected(num_records)
    if source.take == "end":
        return range(num_records - count, num_records)
    if source.take == "random" and count < num_records:
        return np.sort(np.random.default_rng([seed, 0, number]).permutation(num_records)[:count])
    return range(count)


def _epoch_counts(sources: Sequence[Source], selected: Sequence[int]) -> list[int]:
    """Return how many rows of each source one epoch has; at least one of each."""
    if all(source.weight is None for source in sources):
        return [max(1, round(s.repeat * n)) for s, n in zip(sources, selected, strict=True)]
    weights = np.array([source.weight for source in sources], dtype=np.float64)
    exact = weights / weights.sum() * sum(selected)
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: sum(selected) - int(counts.sum())]] += 1
    return np.maximum(counts, 1).tolist()
