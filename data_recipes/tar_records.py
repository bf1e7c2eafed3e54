"""How is a WebDataset shard read at random? By the offsets of its samples, without unpacking it.

A sample is what stands together in the tar under one key, the name up to the first dot of its last
part: `000017.json` and `000017.jpg`, or `000017.0.jpg` and `000017.1.jpg`, or `000017.txt` in place
of the JSON for a caption. The JSON is a record; its `image` may name the sample's pictures by file
name or suffix, and where it has none, all of them are meant, in the tar's order. Its `video` does
the same with videos (`000017.mp4`), or names pictures as frames. Other members are not read. A
record whose sample has no picture, or no video, has it elsewhere, under `image_root`.

The headers are read once, and 8 bytes a sample are kept (see index.py). A shard is opened for each
read and closed again, so that thousands of shards need no more open files than one.
"""

import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_recipes.image_files import Inside
from data_recipes.index import Place, load_or_build
from data_recipes.record_forms import PICTURE_KEYS, TURN_KEYS, VIDEO_KEYS
from data_recipes.scan import Scan
from vlm.errors import UserError

PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
VIDEOS = {"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "flv", "ogv", "wmv", "3gp"}
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


@dataclass(frozen=True)
class Member:
    """A file of a sample: its name in the tar, the part behind the key, and where its bytes are."""

    name: str
    suffix: str
    start: int
    size: int

    @property
    def kind(self) -> str:
        """What it is, by the last part of its name, in lower case."""
        return self.suffix.rpartition(".")[2]


class TarRecords:
    """Random access to the samples of a tar, as records."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._offsets = np.array(load_or_build(self.path, scan_tar).offsets)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Any:
        """Return the record of sample `row`; its pictures become `Inside`.

        Raises:
            UserError: it has neither JSON nor text, or names a picture that it does not have.
        """
        key, members = self._sample(row)
        texts = {m.suffix: self._read(m.start, m.size) for m in members if m.suffix in _TEXTS}
        try:
            raw = json.loads(texts["json"]) if "json" in texts else {}
            caption = texts["txt"].decode("utf-8") if "txt" in texts else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(row)}: broken JSON or text ({error})") from error
        if not texts:
            names = ", ".join(member.name for member in members)
            raise UserError(f"{self.where(row)}: has no .json and no .txt, only {names}")
        if not isinstance(raw, dict):
            return raw
        if caption is not None and not any(name in raw for name in TURN_KEYS):
            raw["caption"] = caption
        pictures = [member for member in members if member.kind in PICTURES]
        videos = [member for member in members if member.kind in VIDEOS]
        found = self._videos(raw, videos, pictures, row)
        frames = {each.key for each in _flat(list(found.values()))}
        pictures = [member for member in pictures if (member.start, member.size) not in frames]
        return {"id": key, **raw, **found, **self._pictures(raw, pictures, row)}

    def __reduce__(self) -> tuple:
        """Reopen in another process."""
        return TarRecords, (self.path,)

    def where(self, row: int) -> str:
        """Return shard and key of sample `row`."""
        return f"{self.path}, sample {self._sample(row)[0]}"

    def place(self, row: int) -> Place:
        """Return `where(row)` as an object that computes its text late."""
        return Place(self.where, row)

    def name_picture(self, key: tuple[int, int]) -> str:
        """Return what errors call the picture whose bytes are `key[1]` from `key[0]` on."""
        row = int(np.searchsorted(self._offsets, key[0], side="right")) - 1
        names = [member.name for member in self._sample(row)[1] if member.start == key[0]]
        return f"{self.path}: {names[0]}"

    def read_picture(self, key: tuple[int, int]) -> bytes:
        """Return the bytes of a picture: `key[1]` from `key[0]` on."""
        return self._read(*key)

    def _read(self, start: int, size: int) -> bytes:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise UserError(f"{self.path}: ends before byte {start + size}; it was cut short")
        return data

    def _sample(self, row: int) -> tuple[str, list[Member]]:
        """Return the key and the members of sample `row`, from its headers."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                here = takewhile(lambda each: each[0] < end, _members(file, self.path))
                found = [(key, member) for _, key, member in here]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return found[0][0], [member for _, member in found]

    def _pictures(self, raw: dict, pictures: list[Member], row: int) -> dict[str, Any]:
        """Return the key `image` for a record whose pictures are in its sample; {} otherwise."""
        if not pictures:
            return {}
        key = next((key for key in PICTURE_KEYS if raw.get(key)), None)
        if key is None:
            return {"image": [self._inside(member) for member in pictures]}
        return {key: self._named(raw[key], key, pictures, row)}

    def _videos(
        self, raw: dict, videos: list[Member], pictures: list[Member], row: int
    ) -> dict[str, Any]:
        """Return the key `video` for a record whose videos or frames are in its sample; else {}."""
        key = next((key for key in VIDEO_KEYS if raw.get(key)), None)
        if key is None:
            return {"video": [self._inside(member) for member in videos]} if videos else {}
        known = {name for member in pictures for name in _names(member)}
        if not videos and not any(str(name) in known for name in _flat(raw[key])):
            return {}
        return {key: self._named(raw[key], key, [*videos, *pictures], row)}

    def _named(self, named: Any, key: str, members: list[Member], row: int) -> list[Any]:
        """Return the members that a record names, lists in lists kept.

        Raises:
            UserError: there is no such member.
        """
        by_name = {name: member for member in members for name in _names(member)}
        found: list[Any] = []
        for name in named if isinstance(named, list) else [named]:
            if isinstance(name, list):
                found.append(self._named(name, key, members, row))
                continue
            if name not in by_name:
                kind = "pictures" if key in PICTURE_KEYS else "videos and pictures"
                raise UserError(
                    f"{self.where(row)}: {key!r} names {name!r}, but the sample's {kind} are "
                    f"{', '.join(member.name for member in members)}"
                )
            found.append(self._inside(by_name[name]))
        return found

    def _inside(self, member: Member) -> Inside:
        return Inside(str(self.path), (member.start, member.size), self, member.name)


_TEXTS = ("json", "txt")


def _names(member: Member) -> tuple[str, str, str]:
    """Return what a record may call a member."""
    return member.suffix, Path(member.name).name, member.name


def _flat(named: Any) -> list[Any]:
    """Return names that stand alone, in a list, or in lists in a list, as one list."""
    return [each for part in named for each in _flat(part)] if isinstance(named, list) else [named]


def scan_tar(path: Path) -> Scan:
    """Return where each sample's first header begins, and where the last sample ends.

    Raises:
        UserError: it is no tar, has no sample, or breaks off.
        OSError: it cannot be read.
    """
    starts, before, end = array("Q"), None, 0
    with path.open("rb") as file:
        for start, key, member in _members(file, path):
            if key != before:
                starts.append(start)
            before, end = key, member.start + member.size
    if not starts:
        raise UserError(f"{path}: holds no sample; members must be named as in 000017.json")
    starts.append(end)
    return Scan(offsets=np.frombuffer(starts, dtype=np.uint64), one_per_line=False)


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, Member]]:
    """Yield where each member's header begins, its sample's key, and the member, from here on.

    Raises:
        UserError: what follows is no tar, or breaks off.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                vars(tar)["members"].clear()  # it would keep them all
                name = NAME.fullmatch(info.name)
                if info.isfile() and not info.issparse() and name is not None:
                    member = Member(info.name, name[2].lower(), info.offset_data, info.size)
                    yield info.offset, name[1], member
            file.seek(tar.offset)
    except tarfile.TarError as error:
        raise UserError(f"{path}: is no whole tar ({error})") from error
    # A broken header in the middle ends the iteration as the true end does: a block of zeros.
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise UserError(f"{path}: the tar is broken at byte {tar.offset}")
