"""Read every record of a file or a mix and count the faults, before a training run meets them.

    vlm data check data/llava_v1_5_mix665k.json --image-root data
    vlm data check data_recipes/mixes/llava_665k.yaml --decode
    vlm data check data/captions.json --captions

Exit code 0: every record can be used. 2: some cannot; each kind is shown with examples.
"""

import argparse
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import UserError

if TYPE_CHECKING:
    from data_recipes.mixture import Source


@dataclass
class Faults:
    """What was found in one source."""

    num_records: int = 0
    num_images: int = 0
    num_videos: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, sentence: str, keep: int) -> None:
        """Count one fault; faults that differ only in names and numbers are of one kind."""
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+", "_", sentence)
        self.kinds[kind] += 1
        if len(self.examples[kind]) < keep:
            self.examples[kind].append(sentence)


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
    parser.add_argument("--examples", type=int, default=3, help="sentences shown of each kind")


def run(args: argparse.Namespace) -> int:
    """Check and print; 2 if there are faults."""
    from data_recipes.mixture import Source, is_mix, load_mix

    path = Path(args.data)
    if is_mix(path):
        sources = load_mix(path, args.image_root)
    else:
        sources = [Source(name=path.name, path=str(path), image_root=args.image_root)]
    bad = 0
    for source in sources:
        faults = check_source(source, args.decode, args.examples, args.captions)
        bad += faults.kinds.total()
        print(describe(source.name, faults))
    return 2 if bad else 0


def check_source(
    source: "Source", decode: bool = False, examples: int = 3, captions: bool = False
) -> Faults:
    """Read every record of a source, as captions if asked; look for its images, or decode them.

    Raises:
        UserError: the file itself cannot be read.
    """
    from tqdm import tqdm

    from data_recipes.captions import to_caption
    from data_recipes.dataset import image_root
    from data_recipes.image_files import VideoFile, is_missing, load_media, locate
    from data_recipes.readers import open_records
    from data_recipes.records import Record, to_messages
    from vlm.video_layout import VideoConfig

    read = to_caption if captions else partial(to_messages, image_position=source.image_position)
    index, root, faults = open_records(source.path), image_root(source), Faults()
    faults.num_records = len(index)
    for row in tqdm(range(len(index)), desc=source.name, unit="record", leave=False):
        try:
            record = read(index[row], index.place(row))
            videos = record.videos if isinstance(record, Record) else ()
            faults.num_images += len(record.images)
            faults.num_videos += len(videos)
        except UserError as error:
            faults.add(str(error), examples)
            continue
        files = [locate(image, root) for image in record.images]
        # As a model that was not told otherwise looks at videos; frames are only looked at.
        files += [VideoFile(str(root / video), VideoConfig(), 32) for video in videos]
        for file in files:
            try:
                if decode:
                    load_media(file)
                elif is_missing(file):
                    kind = "video" if isinstance(file, VideoFile) else "image"
                    raise UserError(f"{file}: no such {kind} file")
            except UserError as error:
                faults.add(f"{index.where(row)} (id {record.id!r}): {error}", examples)
                break
    return faults


def describe(name: str, faults: Faults) -> str:
    """Return the findings of one source as text."""
    bad = faults.kinds.total()
    lines = [
        f"{name}: {faults.num_records} records, {faults.num_images} images, "
        f"{f'{faults.num_videos} videos, ' if faults.num_videos else ''}{bad} record(s) with faults"
    ]
    for kind, count in faults.kinds.most_common():
        lines += [f"  {count} x", *(f"    {sentence}" for sentence in faults.examples[kind])]
    return "\n".join(lines)
