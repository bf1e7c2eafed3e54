"""What is a model told of when a video's frames were taken? A sentence after the video, if any.

LLaVA-Video and LLaVA-NeXT-Video (`add_time_instruction` of llava/train/train.py) put it between the
video and the question, in training and after. The words are theirs to the letter, also where the
frames are not uniform and a space is missing, since models were trained on these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.tile_grids import Size
from vlm.video import SampledVideo, VideoFacts
from vlm.video_layout import VideoConfig


@dataclass(frozen=True)
class ShownVideo:
    """What a video's tokens depend on, without its frames.

    Attributes:
        num_frames: that the model looks at.
        told: what stands after it; None: nothing.
    """

    num_frames: int
    told: str | None = None


Shown = Size | ShownVideo  # (width, height) of an image, or a video


def shown_video(video: SampledVideo | VideoFacts, config: VideoConfig) -> ShownVideo:
    """Return how a video stands in the prompt of a model that looks at it so."""
    told = time_sentence(video.times, video.duration) if config.time_instruction else None
    return ShownVideo(len(video.times), told)


def time_sentence(times: Sequence[float], duration: float) -> str:
    """Return what is said of a video's length and of its frames' times, both in seconds."""
    listed = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {listed}.Please answer the following "
        "questions related to this video."
    )


def with_times(
    messages: Sequence[Mapping[str, Any]], shown: Sequence[Shown]
) -> list[dict[str, Any]]:
    """Return checked messages with what is told of each video in a line of its own after it.

    Args:
        messages: `content` is a list of image, video and text entries.
        shown: their images and videos, in order.
    """
    told = iter([item.told if isinstance(item, ShownVideo) else None for item in shown])
    return [{**message, "content": _told(message["content"], told)} for message in messages]


def _told(content: Sequence[Mapping[str, Any]], told: Iterator[str | None]) -> list[dict[str, Any]]:
    """Return a content with sentences, the next of `told` for each image and video."""
    entries: list[dict[str, Any]] = []
    line_ends = False  # whether a line break already stands where the text goes on
    for number, entry in enumerate(content):
        if entry["type"] == "text":
            text = entry["text"].lstrip("\n") if line_ends else entry["text"]
            entries.append({**entry, "text": text})
            line_ends = False
            continue
        entries.append(dict(entry))
        line_ends = False
        if (sentence := next(told)) is not None:
            line_ends = number + 1 < len(content)
            entries.append({"type": "text", "text": f"\n{sentence}" + "\n" * line_ends})
    return entries
