"""Read every record of a file or a mix and count the faults, before a training run meets them.

    vlm data check data/llava_v1_5_mix665k.json --image-root data
    vlm data check data_recipes/mixes/llava_665k.yaml --decode
    vlm data check data/captions.json --captions
    vlm data check data/web.jsonl --tokenizer Qwen/Qwen2.5-0.5B-Instruct

Exit code 0: every record can be used. 2: some cannot; each kind is shown with examples. Texts that
name special tokens are counted and shown beside, and change no exit code.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import UserError

if TYPE_CHECKING:
    from data_recipes.image_files import Inside, VideoPlace
    from data_recipes.mixture import Source


@dataclass
class Faults:
    """What was found in one source."""

    num_records: int = 0
    num_images: int = 0
    num_videos: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    special: Counter[str] = field(default_factory=Counter)  # token -> records that name it
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, sentence: str, keep: int) -> None:
        """Count one fault; faults that differ only in names and numbers are of one kind."""
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+", "_", sentence)
        self.kinds[kind] += 1
        self._show(kind, sentence, keep)

    def add_special(self, tokens: Sequence[str], name: str, keep: int) -> None:
        """Count a record that names special tokens."""
        for token in tokens:
            self.special[token] += 1
            self._show(token, name, keep)

    def _show(self, kind: str, example: str, keep: int) -> None:
        if len(self.examples[kind]) < keep:
            self.examples[kind].append(example)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to check and how closely."""
    parser.add_argument("data", metavar="FILE_OR_MIX", help="JSON, JSONL, parquet, tars, or a mix")
    parser.add_argument(
        "--image-root", default="", help="folder of image paths, unless the mix says"
    )
    parser.add_argument(
        "--decode", action="store_true", help="also decode every image and video (slow)"
    )
    parser.add_argument(
        "--captions", action="store_true", help="each record must be one picture and its caption"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="whose special tokens are looked for in texts; default: the usual ones",
    )
    parser.add_argument("--examples", type=int, default=3, help="sentences shown of each kind")


def run(args: argparse.Namespace) -> int:
    """Check and print; 2 if there are faults."""
    from data_recipes.mixture import Source, is_mix, load_mix
    from data_recipes.special_text import USUAL, special_tokens_of

    special = USUAL if args.tokenizer is None else special_tokens_of(args.tokenizer)
    path = Path(args.data)
    if is_mix(path):
        sources = load_mix(path, args.image_root)
    else:
        sources = [Source(name=path.name, path=str(path), image_root=args.image_root)]
    bad = 0
    for source in sources:
        faults = check_source(source, args.decode, args.examples, args.captions, special)
        bad += faults.kinds.total()
        print(describe(source.name, faults))
    return 2 if bad else 0


def check_source(
    source: "Source",
    decode: bool = False,
    examples: int = 3,
    captions: bool = False,
    special: re.Pattern[str] | None = None,
) -> Faults:
    """Read every record of a source, as captions if asked; look for its images, or decode them.

    Args:
        source: the records.
        decode: read pictures and videos in full.
        examples: sentences to keep of each kind.
        captions: each record is one picture and its caption.
        special: finds special tokens in texts; None: these are not looked for.

    Raises:
        UserError: the file itself cannot be read.
    """
    from tqdm import tqdm

    from data_recipes.captions import to_caption
    from data_recipes.dataset import image_root
    from data_recipes.readers import open_records
    from data_recipes.records import Record, to_messages
    from data_recipes.special_text import named_tokens, texts_of

    read = to_caption if captions else partial(to_messages, image_position=source.image_position)
    index, root, faults = open_records(source.path), image_root(source), Faults()
    faults.num_records = len(index)
    for row in tqdm(range(len(index)), desc=source.name, unit="record", leave=False):
        try:
            record = read(index[row], index.place(row))
        except UserError as error:
            faults.add(str(error), examples)
            continue
        faults.num_images += len(record.images)
        videos = record.videos if isinstance(record, Record) else ()
        faults.num_videos += len(videos)
        if special is not None:
            texts = texts_of(record.messages) if isinstance(record, Record) else [record.text]
            if tokens := named_tokens(texts, special):
                faults.add_special(tokens, f"{index.where(row)} (id {record.id!r})", examples)
        if fault := _media_fault(record.images, videos, root, decode):
            faults.add(f"{index.where(row)} (id {record.id!r}): {fault}", examples)
    return faults


def _media_fault(
    images: "Sequence[str | Inside]", videos: "Sequence[VideoPlace]", root: Path, decode: bool
) -> str | None:
    """Return what is wrong with the first picture or video that cannot be used; None: nothing."""
    from data_recipes.image_files import (
        MediaFile,
        VideoFile,
        load_media,
        locate,
        locate_video,
        missing,
    )
    from vlm.video_layout import VideoConfig

    files: list[MediaFile] = [locate(image, root) for image in images]
    # As a model that was not told otherwise looks at videos; frames are only looked at.
    files += [VideoFile(locate_video(video, root), VideoConfig(), 32) for video in videos]
    for file in files:
        try:
            if decode:
                load_media(file)
            elif path := missing(file):
                kind = "video" if isinstance(file, VideoFile) else "image"
                return f"{path}: no such {kind} file"
        except UserError as error:
            return str(error)
    return None


def describe(name: str, faults: Faults) -> str:
    """Return the findings of one source as text."""
    bad = faults.kinds.total()
    lines = [
        f"{name}: {faults.num_records} records, {faults.num_images} images, "
        f"{f'{faults.num_videos} videos, ' if faults.num_videos else ''}{bad} record(s) with faults"
    ]
    for kind, count in faults.kinds.most_common():
        lines += [f"  {count} x", *(f"    {sentence}" for sentence in faults.examples[kind])]
    if faults.special:
        lines.append(
            "  special tokens named in texts, which tokenizers that have them read as such:"
        )
    for token, count in faults.special.most_common():
        lines.append(f"    {count} x {token}: {', '.join(faults.examples[token])}")
    return "\n".join(lines)
