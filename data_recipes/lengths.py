"""How many tokens does each record take? Counted once from text and image headers, kept on disk.

A record costs some tenths of a millisecond, so a million of them minutes: the counts lie beside the
data file (4 bytes a record), or in the user's cache folder where the data's cannot be written, and
are filled in as records are asked for. They are counted anew when the data file changes, and apart
for each tokenizer, chat template, tiling and image folder.

Surprise: an image or a video that is replaced by one of another size keeps its old count. A row may
then hold more or fewer tokens than planned; what is computed from it stays right.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_recipes.dataset import ConversationDataset, image_root
from data_recipes.index import cache_places, fingerprint
from data_recipes.mixture import Source
from data_recipes.readers import data_files

FORMAT = 2  # of what is counted; another number makes old counts unknown
UNKNOWN = -1
RECORDS_PER_CALL = 256  # that a worker counts at once
CALLS_AHEAD = 16  # for each worker


class RecordLengths:
    """Token counts of a dataset's rows by position; a record that cannot be used has 0.

    Args:
        dataset: with its processor.
        workers: processes that count what is not known yet; 0: this one.
        progress: whether a line on the terminal counts along where it takes long.
    """

    def __init__(
        self, dataset: ConversationDataset, workers: int = 0, progress: bool = False
    ) -> None:
        self.dataset = dataset
        self.workers = workers
        self.progress = progress
        key = _processor_key(dataset.processor)
        self._caches = [_Cache(source, key) for source in dataset.mixture.sources]
        self._counts = [
            cache.read(len(index))
            for cache, index in zip(self._caches, dataset.indexes, strict=True)
        ]
        self._new = [False] * len(self._counts)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return the lengths (stop - start,) of the rows at positions [start, stop)."""
        found = self._known(start, stop)
        if (found == UNKNOWN).any():
            # Workers are started for many records at once, but not for those of another epoch.
            size = len(self.dataset)
            ahead = start + max(1, self.workers) * CALLS_AHEAD * RECORDS_PER_CALL
            self._count(start, max(stop, min(ahead, (start // size + 1) * size)))
            found = self._known(start, stop)
        return found

    def save(self) -> None:
        """Write what was counted, for other processes and runs; nothing where that is forbidden."""
        for cache, counts, new in zip(self._caches, self._counts, self._new, strict=True):
            if new:
                cache.write(counts)
        self._new = [False] * len(self._counts)

    def _known(self, start: int, stop: int) -> np.ndarray:
        sources, rows = self.dataset.mixture.places(start, stop)
        found = np.empty(stop - start, dtype=np.int64)
        for number, counts in enumerate(self._counts):
            of = sources == number
            found[of] = counts[rows[of]]
        return found

    def _count(self, start: int, stop: int) -> None:
        """Count what is not known at positions [start, stop)."""
        sources, rows = self.dataset.mixture.places(start, stop)
        missing = self._known(start, stop) == UNKNOWN
        # In the order of the files: parquet is read by groups of rows.
        places = sorted(set(zip(sources[missing].tolist(), rows[missing].tolist(), strict=True)))
        # A generator of its own: an iterator draws a seed, and the global one belongs to training.
        loader = DataLoader(
            _Counted(self.dataset, places),
            batch_size=RECORDS_PER_CALL,
            num_workers=self.workers,
            collate_fn=np.array,
            generator=torch.Generator(),
        )
        bar = tqdm(
            total=len(places), desc="lengths", unit="record", delay=2, disable=not self.progress
        )
        done = 0
        with bar:
            for counts in loader:
                for (number, row), count in zip(places[done:], counts.tolist(), strict=False):
                    self._counts[number][row] = count
                    self._new[number] = True
                done += len(counts)
                bar.update(len(counts))


class _Counted(Dataset):
    """Map-style: the token counts of some records."""

    def __init__(self, dataset: ConversationDataset, places: Sequence[tuple[int, int]]) -> None:
        self.dataset = dataset
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> int:
        source, row = self.places[number]
        return self.dataset.count_tokens(source, row)


class _Cache:
    """Where the counts of a source lie: 32 bytes that tell the data file's state, then int32."""

    def __init__(self, source: Source, processor_key: str) -> None:
        told = [processor_key, source.path, source.image_position, source.frame_rate, FORMAT]
        told.append(str(image_root(source).resolve()))
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        files = data_files(source.path)
        self.places = cache_places(files[0], f"lengths-{key}")
        self.state = hashlib.sha256(b"".join(map(fingerprint, files))).digest()

    def read(self, count: int) -> np.ndarray:
        """Return the counts (count,) of the first file that holds them, else unknown ones."""
        for place in self.places:
            try:
                data = place.read_bytes()
            except OSError:
                continue
            if data[:32] == self.state and len(data) == 32 + 4 * count:
                return np.frombuffer(data, dtype="<i4", offset=32).astype(np.int32)
        return np.full(count, UNKNOWN, dtype=np.int32)

    def write(self, counts: np.ndarray) -> None:
        """Write to the first place that can be written."""
        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=place.parent, prefix=place.name) as folder:
                    written = Path(folder) / place.name
                    written.write_bytes(self.state + counts.astype("<i4").tobytes())
                    written.replace(place)
            except OSError:
                continue
            return


def _processor_key(processor: Any) -> str:
    """Return a hash of all that decides how many tokens a conversation takes."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    told = {
        # padding and truncation are left behind there by whoever asked for them last
        "tokenizer": {k: v for k, v in tokenizer.items() if k not in ("padding", "truncation")},
        "special_tokens": processor.tokenizer.special_tokens_map,
        "chat_template": processor.chat_template,
        "image_token": processor.image_token,
        "images": processor.image_processor.to_dict(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
