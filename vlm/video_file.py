"""Which frames are in a video file, and how does one get at a frame without decoding all before it?

Packets are read once without decoding them: their times are exact in every format, also where the
frame rate varies and where a header counts wrongly. What is kept of a frame is 8 bytes.

A seek costs a decoder's start, and decoding from the keyframe before the target is needed anyway:
so one is made only where a keyframe lies between what was decoded last and what is wanted next.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.video_cut import is_cut

# Formats that hold their pictures themselves. A playlist (HLS, concat, SDP) names other files and
# addresses, which a file from a stranger must not have opened.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
# Codecs of which FFmpeg cannot tell in what order packets are shown unless the file says it.
REORDERING = ("h264", "hevc")


@dataclass(frozen=True)
class VideoBytes:
    """A video file that lies inside another one.

    Attributes:
        data: of the file.
        name: what errors call it.
    """

    data: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name


VideoPath = str | Path | VideoBytes


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What is refused, so that no file takes more memory or time than it may.

    Attributes:
        max_seconds: longest video.
        max_pixels: largest width * height of a frame.
        max_file_frames: most frames in the file, chosen or not.
        max_work_seconds: longest time that reading may take; None: any.
    """

    max_seconds: float = 4 * 3600.0
    max_pixels: int = 8192 * 4320
    max_file_frames: int = 1_000_000
    max_work_seconds: float | None = None


@dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown, in ticks of `tick` seconds, rising.

    Attributes:
        shown: (n,) int64, one for each frame.
        keys: those of them from which decoding can begin.
        tick: seconds.
        end: when the last frame is over.
        counted: the file does not say which packet is shown when: its frames are known by their
            place among all.
    """

    shown: np.ndarray
    keys: np.ndarray
    tick: Fraction
    end: int
    counted: bool = False

    @property
    def seconds(self) -> list[float]:
        """Times of the frames, counted from the first one's."""
        return ((self.shown - self.shown[0]) * float(self.tick)).tolist()

    @property
    def duration(self) -> float:
        """From the first frame's beginning to the last one's end, in seconds."""
        return (self.end - int(self.shown[0])) * float(self.tick)


def read_timeline(path: VideoPath, limits: VideoLimits) -> Timeline:
    """Return when the frames of a video are shown; nothing is decoded.

    Raises:
        UserError: the file is missing, empty, no video, or more than the limits allow.
    """
    checked = Deadline(path, limits)
    with told(path), open_video(path, limits) as (container, stream):
        shown, keys, end = [], [], None
        coder = stream.codec_context
        reorders = coder.name in REORDERING and coder.has_b_frames
        # AVI knows the order of decoding alone: what FFmpeg gives as times there is a guess.
        counted = reorders and container.format.name == "avi"
        for packet in container.demux(stream):
            checked.tick()
            stamp = packet.dts if counted or packet.pts is None else packet.pts
            if not packet.size or packet.is_discard or stamp is None:
                continue
            counted = counted or (reorders and packet.pts is None)
            shown.append(stamp)
            if packet.is_keyframe:
                keys.append(stamp)
            over = stamp + (packet.duration or 0)
            end = over if end is None else max(end, over)
            check_count(path, len(shown), limits)
        if end is None:
            raise UserError(f"video {path} holds no frame", "video_no_frame", path=path)
        tick = stream.time_base
        timeline = Timeline(np.unique(shown), np.unique(keys), tick, end, counted)
    check_seconds(path, timeline.duration, limits)
    return timeline


def frames_shown_at(
    path: VideoPath, timeline: Timeline, wanted: Sequence[int], limits: VideoLimits, threads: int
) -> Iterator[tuple[Any, float]]:
    """Yield decoded frames (av.VideoFrame) at some ticks of the timeline, and how wide pixels are.

    The ticks rise; a pixel's width is that over its height, 1 almost everywhere.

    Args:
        path: the file.
        timeline: what `read_timeline` gave for it.
        wanted: which of `timeline.shown`.
        limits: refused is what exceeds them, in any frame that is decoded.
        threads: of the decoder; 0: its own choice.

    Raises:
        UserError: a frame cannot be decoded.
    """
    keys, deadline, frame = timeline.keys.tolist(), Deadline(path, limits), None
    with told(path), open_video(path, limits, threads) as (container, stream):
        decoder, aspect = container.decode(stream), float(stream.sample_aspect_ratio or 1)
        if timeline.counted:
            for frame in _counted_frames(path, timeline, wanted, limits, decoder):
                yield frame, aspect
            return
        for target in wanted:
            before = bisect_right(keys, target)
            ahead = before and (frame is None or keys[before - 1] > frame.pts)
            if ahead and before > 1:
                decoder = _from_key(container, stream, keys[:before])
            while frame is None or frame.pts is None or frame.pts < target:
                deadline.tick()
                frame = next(decoder, None)
                if frame is None:
                    break
                _check_pixels(path, frame.width, frame.height, limits)
            if frame is None or frame.pts != target or frame.is_corrupt:
                raise _frame_damaged(path, timeline, target)
            yield frame, aspect


def _counted_frames(
    path: VideoPath,
    timeline: Timeline,
    wanted: Sequence[int],
    limits: VideoLimits,
    decoder: Iterator[Any],
) -> Iterator[Any]:
    """Yield the frames whose place is that of a wanted tick; all are decoded, none is kept.

    A decoder gives frames in the order in which they are shown. It goes on to the end: were one
    lost on the way, those behind it would have been the wrong ones.
    """
    chosen, deadline, count = set(wanted), Deadline(path, limits), 0
    for frame in decoder:
        deadline.tick()
        _check_pixels(path, frame.width, frame.height, limits)
        tick = int(timeline.shown[count]) if count < len(timeline.shown) else None
        count += 1
        if tick in chosen:
            if frame.is_corrupt:
                raise _frame_damaged(path, timeline, tick)
            yield frame
    if count != len(timeline.shown):
        raise _damaged(path)


def _frame_damaged(path: VideoPath, timeline: Timeline, tick: int) -> UserError:
    at = (tick - int(timeline.shown[0])) * float(timeline.tick)
    return UserError(
        f"video {path}: its frame at {at:.2f} s cannot be decoded; the file is damaged "
        "or cut short",
        "video_frame_damaged",
        path=path,
        seconds=at,
    )


def _damaged(path: VideoPath) -> UserError:
    return UserError(
        f"video {path} cannot be read: it is damaged, cut short, or no video (known are MP4, "
        "MOV, MKV, WebM, AVI, MPEG, FLV, OGG, ASF and GIF)",
        "video_damaged",
        path=path,
    )


def _from_key(container: Any, stream: Any, keys: Sequence[int]) -> Iterator[Any]:
    """Seek and return a decoder that gives the last of some keyframes or an earlier one first.

    A demuxer seeks by the order of decoding, which may land behind the frame asked for.
    """
    for key in reversed(keys[-4:]):
        container.seek(key, stream=stream)
        decoder = container.decode(stream)
        first = next(decoder, None)
        if first is not None and first.pts is not None and first.pts <= keys[-1]:
            return _with_first(first, decoder)
    container.seek(keys[0], stream=stream)
    return container.decode(stream)


def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


@contextmanager
def open_video(path: VideoPath, limits: VideoLimits, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """Yield (container, stream) of a file whose header was checked.

    Raises:
        UserError: PyAV is not installed, the file is empty or cut short, holds no moving pictures,
            or its header says that they are more than the limits allow.
    """
    av = pyav()
    with BytesIO(path.data) if isinstance(path, VideoBytes) else Path(path).open("rb") as file:
        if not file.read(1):
            raise UserError(f"video {path} is empty (0 bytes)", "video_empty", path=path)
        if is_cut(file):
            raise _damaged(path)
        options = {"format_whitelist": FORMATS}
        # A file object, not its name: names may be addresses to FFmpeg.
        with av.open(file, "r", container_options=options, metadata_errors="ignore") as container:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                sound = "sound alone" if container.streams.audio else "no pictures"
                raise UserError(
                    f"video {path} holds {sound}; there is nothing to see",
                    "video_no_pictures",
                    path=path,
                )
            stream = streams[0]
            if stream.codec_context is None:
                raise UserError(
                    f"video {path} is coded in a way that PyAV does not know",
                    "video_unknown_codec",
                    path=path,
                )
            _check_pixels(path, stream.width or 0, stream.height or 0, limits)
            if stream.duration is not None:
                check_seconds(path, float(stream.duration * stream.time_base), limits)
            for other in container.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            stream.thread_count = threads
            stream.thread_type = "AUTO"
            yield container, stream


def pyav() -> Any:
    """Return the library that decodes; it is in an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
        import av.stream
    except ModuleNotFoundError as error:
        raise UserError(
            "videos need PyAV, which is not installed; it comes with: make extras EXTRAS=video",
            "no_videos",
        ) from error
    return av


@contextmanager
def told(path: VideoPath) -> Iterator[None]:
    """Turn what FFmpeg raises on a file into one sentence.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    av = pyav()
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"video {path}: no such file") from error
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        raise _damaged(path) from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise UserError(
            f"video {path} cannot be read: {reason}", "video_unreadable", path=path, reason=reason
        ) from error


class Deadline:
    """Ends work that takes longer than it may; `path` is what errors call the video."""

    def __init__(self, path: object, limits: VideoLimits) -> None:
        self.path, self.limit = path, limits.max_work_seconds
        self.begun = monotonic()

    def tick(self) -> None:
        """Go on, or stop.

        Raises:
            UserError: the time is over.
        """
        if self.limit is not None and monotonic() - self.begun > self.limit:
            raise UserError(
                f"video {self.path} takes more than {self.limit:g} s to read; cut it or make it "
                "smaller",
                "video_slow",
                path=self.path,
                limit=self.limit,
            )


def check_count(path: object, frames: int, limits: VideoLimits) -> None:
    """Refuse more frames than are read; raises UserError."""
    if frames > limits.max_file_frames:
        raise UserError(
            f"video {path} has more than the {limits.max_file_frames:,} frames that are read; "
            "cut it",
            "video_frames",
            path=path,
            limit=limits.max_file_frames,
        )


def check_seconds(path: object, seconds: float, limits: VideoLimits) -> None:
    """Refuse a video that is too long; raises UserError."""
    if seconds > limits.max_seconds:
        raise UserError(
            f"video {path} lasts {seconds:,.0f} s, more than the limit of "
            f"{limits.max_seconds:,.0f} s; cut it",
            "video_long",
            path=path,
            seconds=seconds,
            limit=limits.max_seconds,
        )


def _check_pixels(path: VideoPath, width: int, height: int, limits: VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise UserError(
            f"video {path} has frames of {width}x{height} = {width * height:,} pixels, more than "
            f"the limit of {limits.max_pixels:,}; make them smaller",
            "video_large",
            path=path,
            width=width,
            height=height,
            limit=limits.max_pixels,
        )
