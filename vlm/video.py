"""How does a video become a few frames with their times, or one sentence that says why not?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.errors import UserError
from vlm.frame_files import FRAME_RATE, FrameFiles, frames_in
from vlm.video_file import VideoLimits, VideoPath, frames_shown_at, read_timeline
from vlm.video_sampling import check_sampling, choose_frames, evenly

__all__ = ["DEFAULT_LIMITS", "SampledVideo", "VideoFacts", "VideoLimits", "sample_video", "thin"]

DEFAULT_LIMITS = VideoLimits()
VideoSource = VideoPath | FrameFiles
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class SampledVideo:
    """Frames of a video, upright and in RGB.

    Attributes:
        frames: in order, all of one size unless the video changes it.
        times: seconds after the video's first frame, rising.
        duration: of the video, in seconds.
        num_file_frames: frames of the file, chosen or not.
        name: what errors and lists call it.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    duration: float
    num_file_frames: int
    name: str = "<video>"


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a video without decoding a frame; attributes as of `SampledVideo`."""

    times: tuple[float, ...]
    duration: float
    num_file_frames: int


def sample_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    target_size: int | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
    threads: int = 1,
) -> SampledVideo:
    """Return chosen frames of a video, exactly these and no others; memory is that of them.

    Args:
        source: a file, the bytes of one, or pictures that are its frames: a folder of them (of
            `FRAME_RATE`), or `FrameFiles`.
        num_frames: so many, evenly spread, first and last included; see `choose_frames`.
        fps: so many a second. Give one of both; neither: every frame.
        max_frames: how many at most.
        target_size: if frames will be scaled to squares of this side: larger ones are shrunk while
            they are converted, to twice as much on the shorter side.
        limits: what is refused.
        threads: of the decoder; 0: its own choice.

    Raises:
        UserError: the file is missing, empty, damaged, holds no moving pictures, or exceeds a
            limit; or the sampling means nothing.
    """
    check_sampling(num_frames, fps, max_frames)
    rule = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
    source = with_frames(source)
    if isinstance(source, FrameFiles):
        seconds = source.times(limits)
        chosen = choose_frames(seconds, **rule)
        frames = tuple(source.pictures(chosen, target_size, limits))
        duration = len(seconds) / source.rate
    else:
        timeline = read_timeline(source, limits)
        seconds, duration = timeline.seconds, timeline.duration
        chosen = choose_frames(seconds, **rule)
        wanted = [int(timeline.shown[number]) for number in chosen]
        decoded = frames_shown_at(source, timeline, wanted, limits, threads)
        frames = tuple(_picture(frame, aspect, target_size) for frame, aspect in decoded)
    times = tuple(seconds[number] for number in chosen)
    return SampledVideo(frames, times, duration, len(seconds), str(source))


def video_facts(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> VideoFacts:
    """Return what `sample_video` would choose, without decoding; the same errors."""
    check_sampling(num_frames, fps, max_frames)
    source = with_frames(source)
    if isinstance(source, FrameFiles):
        seconds, duration = source.times(limits), len(source.files) / source.rate
    else:
        timeline = read_timeline(source, limits)
        seconds, duration = timeline.seconds, timeline.duration
    chosen = choose_frames(seconds, num_frames=num_frames, fps=fps, max_frames=max_frames)
    return VideoFacts(tuple(seconds[number] for number in chosen), duration, len(seconds))


def with_frames(source: VideoSource, rate: float = FRAME_RATE) -> VideoSource:
    """Return a folder as its frames, so many a second; anything else as it is.

    Raises:
        UserError: the folder has none.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return FrameFiles(frames_in(source), rate, str(source))
    return source


def thin(video: SampledVideo, count: int) -> SampledVideo:
    """Return a video with at most `count` of its frames, evenly spread."""
    kept = evenly(video.times, count)
    return SampledVideo(
        tuple(video.frames[number] for number in kept),
        tuple(video.times[number] for number in kept),
        video.duration,
        video.num_file_frames,
        video.name,
    )


def video_of_frames(frames: Sequence[Image.Image], fps: float = 1.0) -> SampledVideo:
    """Return pictures that are frames already as a video.

    Raises:
        UserError: there are none.
    """
    if not frames:
        raise UserError("a video needs at least one frame")
    times = tuple(number / fps for number in range(len(frames)))
    return SampledVideo(tuple(frames), times, len(frames) / fps, len(frames))


def _picture(frame: Any, aspect: float, target_size: int | None) -> Image.Image:
    """Return a decoded frame in RGB: square pixels, shrunk if asked, turned as the file says."""
    width, height = max(1, round(frame.width * aspect)), frame.height
    shrink = 1.0 if target_size is None else min(1.0, 2 * target_size / min(width, height))
    width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
    method = "AREA" if shrink < 1 else "BICUBIC"
    image = frame.to_image(width=width, height=height, interpolation=method)
    turn = _TURNS.get(round(frame.rotation / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)
