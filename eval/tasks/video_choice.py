"""Multiple-choice questions about clips: what is asked, and what is shown?

A parquet with CV-Bench's columns and `video`, a path beside the file, in place of the image. Scores
are accuracies per task and over all questions. The clips' own bytes are in no fingerprint: a clip
that is replaced while a run stands still is not noticed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from eval.protocols import Protocol
from eval.task import Example
from eval.tasks.cv_bench import CvBench
from vlm.errors import UserError
from vlm.video import sample_video

STRIP = 4  # frames that stand for a clip in a picture


class VideoChoice(CvBench):
    """Questions about clips, in CV-Bench's columns."""

    name: ClassVar[str] = "video_choice"
    summary: ClassVar[str] = "multiple choice about clips: CV-Bench's columns, `video` with paths"
    shown: ClassVar[str] = "video"

    def media(self, index: int) -> list[Image.Image | Path]:
        """Return the question's one clip.

        Raises:
            UserError: there is no path.
        """
        stored, where, table = self.stored(index)
        if not isinstance(stored, str) or not stored:
            raise UserError(f"{where}: no video; the column needs a path beside the file")
        return [table.path.parent / stored]

    def images(self, index: int) -> list[Image.Image]:
        """Return some frames of the clip in one picture, for people."""
        (path,) = self.media(index)
        assert isinstance(path, Path)
        frames = sample_video(path, num_frames=STRIP, target_size=112).frames
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
