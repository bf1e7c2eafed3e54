"""Do files of all kinds give exactly the frames asked for, or one sentence that says why not?"""

import os
import sys

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.video import VideoLimits, sample_video, thin, video_facts, video_of_frames

av = pytest.importorskip("av")

KINDS = {
    "b_frames.mp4": {},
    "long_gop.mkv": {"gop": 60},
    "keys_only.mov": {"codec": "mpeg4", "gop": 1, "b_frames": 0},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "old.avi": {"codec": "mpeg4"},
    "untimed.avi": {},
    "stream.ts": {"gop": 7},
    "lossless.mkv": {"codec": "ffv1", "b_frames": 0, "gop": 1},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory, make_clip):
    folder = tmp_path_factory.mktemp("clips")
    return {name: make_clip(folder / name, **options) for name, options in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_exactly_the_frames_asked_for(name, clips, frame_number):
    video = sample_video(clips[name], num_frames=7)
    assert [frame_number(frame) for frame in video.frames] == [0, 4, 9, 14, 19, 24, 29]
    assert video.times == pytest.approx([n / 25 for n in (0, 4, 9, 14, 19, 24, 29)], abs=1e-3)
    assert video.duration == pytest.approx(30 / 25, abs=0.05)
    assert video.num_file_frames == 30
    assert {frame.size for frame in video.frames} == {(64, 48)}
    assert {frame.mode for frame in video.frames} == {"RGB"}


@pytest.mark.parametrize("name", ["b_frames.mp4", "stream.ts", "old.avi", "untimed.avi"])
def test_every_frame_alone(name, clips, frame_number):
    """Each by a seek of its own, and all in a row."""
    assert [frame_number(f) for f in sample_video(clips[name]).frames] == list(range(30))
    from vlm.video_file import frames_shown_at, read_timeline

    limits = VideoLimits()
    timeline = read_timeline(clips[name], limits)
    for number, tick in enumerate(timeline.shown.tolist()):
        ((frame, _),) = frames_shown_at(clips[name], timeline, [tick], limits, 1)
        assert frame_number(frame.to_image()) == number


def test_frames_lost_on_the_way_shift_no_others(tmp_path, clips):
    """H.264 in AVI has no times to know a frame by: its place counts, so none may be missing."""
    path = tmp_path / "headless.avi"
    with av.open(str(clips["untimed.avi"])) as whole, av.open(str(path), "w") as headless:
        stream = headless.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if number > 4 and packet.size:  # without its keyframe, which a decoder needs
                packet.stream = stream
                headless.mux(packet)
    with pytest.raises(UserError, match="damaged, cut short"):
        sample_video(path, num_frames=4)


def test_facts_are_those_of_the_sampled_video(clips):
    for sampling in ({"num_frames": 5}, {"fps": 5.0}, {"fps": 50.0, "max_frames": 6}, {}):
        facts = video_facts(clips["vp9.webm"], **sampling)
        video = sample_video(clips["vp9.webm"], **sampling)
        assert (facts.times, facts.duration) == (video.times, video.duration)


def test_varying_rate_goes_by_the_clock(tmp_path, make_clip, frame_number):
    times = [40 * n + (3000 if n > 10 else 0) for n in range(30)]
    path = make_clip(tmp_path / "uneven.mp4", times_ms=times)
    video = sample_video(path, fps=1)
    assert [frame_number(frame) for frame in video.frames] == [0, 10, 25]
    assert video.times == pytest.approx([0, 0.4, 4.0], abs=2e-3)


@pytest.mark.parametrize(
    ("degrees", "size", "corner"),
    [(90, (48, 64), (0, 0)), (-90, (48, 64), (-1, -1)), (180, (64, 48), (0, -1))],
)
def test_turned_as_the_file_says(degrees, size, corner, tmp_path, make_clip):
    path = make_clip(tmp_path / "turned.mp4", num_frames=2, rotation=degrees)
    frame = sample_video(path, num_frames=1).frames[0]
    assert frame.size == size
    red, green, blue = frame.getpixel((corner[0] % size[0], corner[1] % size[1]))
    assert red > 150 and green < 100 and blue < 100


def test_pixels_become_square(tmp_path, make_clip):
    path = make_clip(tmp_path / "wide.mp4", num_frames=2, aspect=2)
    assert sample_video(path, num_frames=1).frames[0].size == (128, 48)


def test_shrunk_while_converted(clips, frame_number):
    video = sample_video(clips["b_frames.mp4"], num_frames=3, target_size=12)
    assert {frame.size for frame in video.frames} == {(32, 24)}
    assert sample_video(clips["b_frames.mp4"], target_size=48).frames[0].size == (64, 48)


def test_thinned_and_made_of_pictures(clips, frame_number):
    video = thin(sample_video(clips["b_frames.mp4"], num_frames=9), 3)
    assert [frame_number(frame) for frame in video.frames] == [0, 14, 29]
    made = video_of_frames(video.frames, fps=2)
    assert made.times == (0, 0.5, 1.0) and made.duration == 1.5
    with pytest.raises(UserError, match="at least one frame"):
        video_of_frames([])


def test_decodes_no_more_than_it_must(tmp_path, make_clip, monkeypatch):
    """Keyframes every 10: frame 35 of 60 needs 30 to 35; of 12 and 14, the second needs no seek."""
    import vlm.video_file as files

    path = make_clip(tmp_path / "long.mp4", num_frames=60)
    decoded, seeks = [], []
    check, from_key = files._check_pixels, files._from_key
    monkeypatch.setattr(files, "_check_pixels", lambda *a: decoded.append(a) or check(*a))
    monkeypatch.setattr(files, "_from_key", lambda *a: seeks.append(a) or from_key(*a))
    timeline = files.read_timeline(path, VideoLimits())

    def work(*numbers):
        decoded.clear(), seeks.clear()
        ticks = [int(timeline.shown[number]) for number in numbers]
        assert len(list(files.frames_shown_at(path, timeline, ticks, VideoLimits(), 1))) == len(
            numbers
        )
        return len(decoded) - 1, len(seeks)  # the header is checked too

    assert work(35) == (6, 1)
    assert work(5) == (6, 0)
    assert work(12, 14) == (5, 1)
    assert work(12, 51) == (5, 2)


def test_files_that_are_refused(tmp_path, make_clip, clips):
    whole = clips["b_frames.mp4"].read_bytes()
    cases = {
        "text.mp4": (b"not a video" * 50, "damaged, cut short, or no video"),
        "empty.mp4": (b"", r"is empty \(0 bytes\)"),
        "header.mp4": (whole[:64], "damaged, cut short"),
        "list.m3u8": (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
            "damaged, cut short, or no video",
        ),
        "list.mp4": (b"ffconcat version 1.0\nfile 'b_frames.mp4'\n", "no video"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words) as told:
            sample_video(tmp_path / name, num_frames=2)
        assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match="no such file"):
        sample_video(tmp_path / "absent.mp4", num_frames=2)
    with pytest.raises(UserError, match="is a folder"):
        sample_video(tmp_path, num_frames=2)
    with pytest.raises(UserError, match="no such file"):
        sample_video("http://127.0.0.1:9/clip.mp4", num_frames=2)
    if os.geteuid():
        (tmp_path / "locked.mp4").write_bytes(whole)
        (tmp_path / "locked.mp4").chmod(0)
        with pytest.raises(UserError, match="Permission denied"):
            sample_video(tmp_path / "locked.mp4", num_frames=2)


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="holds sound alone"):
        sample_video(tmp_path / "sound.mp4", num_frames=2)


@pytest.mark.parametrize("kind", ["vp9.webm", "lossless.mkv", "old.avi", "first.mp4"])
def test_a_file_cut_short_is_refused(kind, tmp_path, clips, make_clip):
    if kind == "first.mp4":  # its index stands before the frames: what is cut can be opened
        make_clip(tmp_path / "last.mp4")
        with av.open(str(tmp_path / "last.mp4")) as last:
            with av.open(str(tmp_path / kind), "w", options={"movflags": "faststart"}) as first:
                stream = first.add_stream_from_template(last.streams.video[0])
                for packet in filter(lambda each: each.size, last.demux(video=0)):
                    packet.stream = stream
                    first.mux(packet)
    data = (tmp_path / kind if kind == "first.mp4" else clips[kind]).read_bytes()
    (tmp_path / "whole").write_bytes(data)
    assert video_facts(tmp_path / "whole").num_file_frames == 30
    (tmp_path / "cut").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UserError, match="damaged, cut short") as told:
        video_facts(tmp_path / "cut")
    assert told.value.code == "video_damaged"


def test_a_file_that_tells_no_size_is_taken_as_it_is(tmp_path, clips):
    """MPEG-TS has no end; a WebM that was sent while it was recorded has none yet."""
    data = clips["stream.ts"].read_bytes()
    (tmp_path / "half.ts").write_bytes(data[: len(data) // 2 // 188 * 188])
    assert 5 < video_facts(tmp_path / "half.ts").num_file_frames < 30
    data = clips["vp9.webm"].read_bytes()
    at = data.index(b"\x18\x53\x80\x67") + 4
    (tmp_path / "sent.webm").write_bytes(data[:at] + b"\x01" + b"\xff" * 7 + data[at + 8 :])
    assert video_facts(tmp_path / "sent.webm").num_file_frames == 30


def test_damage_is_told_with_its_time(tmp_path, clips):
    data = bytearray(clips["b_frames.mp4"].read_bytes())
    start = data.index(b"mdat") + 200
    data[start : start + 2000] = b"\xff" * 2000
    (tmp_path / "holed.mp4").write_bytes(data)
    with pytest.raises(UserError, match=r"frame at \d+\.\d\d s cannot be decoded|is damaged"):
        sample_video(tmp_path / "holed.mp4")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (VideoLimits(max_seconds=1.0), "lasts 1 s, more than the limit of 1 s"),
        (VideoLimits(max_pixels=64 * 47), "64x48 = 3,072 pixels, more than the limit of 3,008"),
        (VideoLimits(max_file_frames=29), "more than the 29 frames"),
        (VideoLimits(max_work_seconds=0.0), "takes more than 0 s to read"),
    ],
)
@pytest.mark.parametrize("name", ["b_frames.mp4", "long_gop.mkv"])
def test_limits(limits, words, name, clips):
    with pytest.raises(UserError, match=words):
        sample_video(clips[name], num_frames=2, limits=limits)


def test_without_the_library_one_sentence(monkeypatch, clips):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="make extras EXTRAS=video"):
        sample_video(clips["b_frames.mp4"], num_frames=2)


def test_a_frame_that_is_not_there_is_no_other(clips):
    from vlm.video_file import frames_shown_at, read_timeline

    timeline = read_timeline(clips["b_frames.mp4"], VideoLimits())
    between = int(timeline.shown[4]) + 1
    with pytest.raises(UserError, match=r"frame at 0\.16 s cannot be decoded"):
        list(frames_shown_at(clips["b_frames.mp4"], timeline, [between], VideoLimits(), 1))
