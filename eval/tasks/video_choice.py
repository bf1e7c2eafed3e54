"""Multiple-choice questions about clips: what is asked, and what is shown?

A parquet with CV-Bench's columns and `video` in place of the image: a path beside the file, of a
clip or of a folder of frames, a list of frames' paths, or the clip itself (bytes, or Hugging Face's
{bytes, path}). Scores are accuracies per task and over all questions. Clips beside the file count
as its data: a run that goes on, and an ablation, notice when one is replaced.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from eval.parquet_rows import ParquetRows
from eval.protocols import Protocol
from eval.task import DataFile, Example, told_with
from eval.tasks.cv_bench import CvBench
from vlm.errors import UserError
from vlm.file_hash import hash_file
from vlm.frame_files import FRAME_RATE, FrameFiles
from vlm.video import VideoSource, sample_video, with_frames
from vlm.video_file import VideoBytes

STRIP = 4  # frames that stand for a clip in a picture
WHOLE_CLIP_BYTES = (
    1 << 26
)  # larger clips are told apart by their ends: videos of 10 GB are not read


class VideoChoice(CvBench):
    """Questions about clips, in CV-Bench's columns."""

    name: ClassVar[str] = "video_choice"
    summary: ClassVar[str] = "multiple choice about clips: CV-Bench's columns, `video` with paths"
    shown: ClassVar[str] = "video"

    def __init__(self, tables: Sequence[ParquetRows], files: Sequence[DataFile]) -> None:
        """Take the clips of each table as one more file.

        Raises:
            UserError: a clip is missing.
        """
        super().__init__(tables, [*files, *filter(None, map(_clips, tables))])

    def media(self, index: int) -> list[Image.Image | VideoSource]:
        """Return the question's one clip.

        Raises:
            UserError: there is none.
        """
        stored, where, table = self.stored(index)
        return [_source(stored, table.path.parent, where)]

    def images(self, index: int) -> list[Image.Image]:
        """Return some frames of the clip in one picture, for people."""
        stored, where, table = self.stored(index)
        source = _source(stored, table.path.parent, where)
        with told_with(where):
            frames = sample_video(source, num_frames=STRIP, target_size=112).frames
        strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
        left = 0
        for frame in frames:
            strip.paste(frame, (left, 0))
            left += frame.width
        return [strip]

    def prompt(self, example: Example, protocol: Protocol, *, blind: bool) -> list[dict[str, Any]]:
        """Return the messages to send: the video, then the text; blind leaves the video out."""
        text = {"type": "text", "text": protocol.wrap(example.prompt)}
        return [{"role": "user", "content": [text] if blind else [{"type": "video"}, text]}]

    def label(self, indices: Sequence[int]) -> str:
        """Return how many questions of how many."""
        return f"questions about clips, {len(indices)} of {self.num_examples}"


def _source(stored: Any, folder: Path, where: str) -> VideoSource:
    """Return the clip that the column holds.

    Raises:
        UserError: it holds none.
    """
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, bytes) and stored:
        return VideoBytes(stored, where)
    if isinstance(stored, str) and stored:
        with told_with(where):
            return with_frames(folder / stored)
    if isinstance(stored, list) and stored and all(isinstance(each, str) for each in stored):
        return FrameFiles(tuple(folder / each for each in stored), FRAME_RATE, where)
    raise UserError(
        f"{where}: no video; the column needs a path beside the file, a list of frames' paths, or "
        "the bytes of a clip"
    )


def _clips(table: ParquetRows) -> DataFile | None:
    """Return the clips beside a file as one of its data files; None: it holds them itself.

    Raises:
        UserError: one is missing.
    """
    known: dict[Path, str] = {}
    digest = hashlib.sha256()
    for row in range(len(table.rows)):
        where = f"{table.path}, row {row}"
        source = _source(table.heavy(row), table.path.parent, where)
        if isinstance(source, VideoBytes):
            continue
        for path in map(Path, source.files if isinstance(source, FrameFiles) else [source]):
            if path not in known:
                known[path] = _hash(path, where)
            digest.update(f"{os.path.relpath(path, table.path.parent)} {known[path]}\n".encode())
    if not known:
        return None
    return DataFile(path=f"{table.path}: its clips", rows=len(known), sha256=digest.hexdigest())


def _hash(path: Path, where: str) -> str:
    try:
        found = hash_file(path, WHOLE_CLIP_BYTES)
    except OSError as error:
        raise UserError(f"{where}: video {path}: {error.strerror}") from error
    return f"{found['bytes']} {found.get('sha256') or found['sha256_of_ends']}"
