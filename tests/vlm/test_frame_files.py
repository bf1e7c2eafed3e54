"""Are a folder's or a list's pictures a video like any other, and is what is none told?"""

import pytest
from PIL import Image

from vlm.errors import UserError
from vlm.frame_files import FrameFiles, frames_in
from vlm.video import VideoLimits, sample_video, video_facts, with_frames


@pytest.fixture
def folder(tmp_path):
    """Frames 0 to 11, each of its own grey, whose names have no leading zeros."""
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number,) * 3).save(tmp_path / f"f{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".f99.png").write_text("hidden")
    return tmp_path


def greys(video):
    return [frame.getpixel((0, 0))[0] // 20 for frame in video.frames]


def test_a_folder_is_a_video(folder):
    video = sample_video(folder, num_frames=4)
    assert greys(video) == [0, 3, 7, 11]
    assert video.times == (0.0, 1.5, 3.5, 5.5) and video.duration == 6.0  # 2 a second
    assert (video.num_file_frames, video.name) == (12, str(folder))
    facts = video_facts(folder, num_frames=4)
    assert (facts.times, facts.duration) == (video.times, 6.0)


def test_the_rate_decides_what_fps_takes(folder):
    assert greys(sample_video(folder, fps=1)) == [0, 2, 4, 6, 8, 10]
    assert greys(sample_video(with_frames(folder, rate=12), fps=4)) == [0, 3, 6, 9]


def test_a_list_has_the_order_it_is_given(folder):
    files = tuple(str(folder / f"f{number}.png") for number in (7, 3, 5))
    assert greys(sample_video(FrameFiles(files, 2.0, "three"))) == [7, 3, 5]


def test_large_frames_are_shrunk(tmp_path):
    Image.new("RGB", (400, 200)).save(tmp_path / "0.jpg")
    assert sample_video(tmp_path, target_size=32).frames[0].size == (128, 64)
    assert sample_video(tmp_path).frames[0].size == (400, 200)


def test_what_is_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="is a folder without pictures"):
        sample_video(empty, num_frames=2)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        frames_in(empty / "gone")
    with pytest.raises(UserError, match="holds no frame"):
        sample_video(FrameFiles((), 2.0, "nothing"))
    (folder / "f5.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"image .*f5\.png cannot be read"):
        sample_video(folder)
    assert len(sample_video(folder, num_frames=2).frames) == 2  # the broken one is not looked at
    with pytest.raises(UserError, match=r"f0\.png is 40x30 = 1,200 pixels, more than the limit"):
        sample_video(folder, num_frames=1, limits=VideoLimits(max_pixels=1000))
    with pytest.raises(UserError, match="more than the 11 frames"):
        sample_video(folder, num_frames=1, limits=VideoLimits(max_file_frames=11))
    with pytest.raises(UserError, match="lasts 6 s, more than the limit of 5 s"):
        video_facts(folder, limits=VideoLimits(max_seconds=5))
    with pytest.raises(UserError, match="takes more than 0 s to read"):
        sample_video(folder, limits=VideoLimits(max_work_seconds=0.0))
