"""Where do the boxes of an answer show: on its picture, or on which frames of its video?

A box in an answer about a video belongs to the moment that the answer names before it, or beside it
in JSON (`vlm.seeing.moments`); it is drawn on the frame that the model saw nearest to that moment.
"""

from collections import defaultdict
from collections.abc import Sequence

from PIL import Image

from demo.seeing.boxes_figure import draw_boxes
from demo.seeing.looked import Looked
from demo.seeing.pictures import as_html, told_html
from demo.wording import say
from vlm.image_processing import VlmImageProcessor
from vlm.seeing.boxes import Corners, NamedBox, boxes_in, on_image
from vlm.seeing.moments import moment_of, nearest_frame
from vlm.seeing.token_places import canvas_box
from vlm.tiles_view import view_of_processor
from vlm.tiling import PadTiling
from vlm.video import SampledVideo


def boxes_html(looked: Looked, image: int, processor: VlmImageProcessor, language: str) -> str:
    """Return a picture, or frames of a video, with the boxes of the answer."""
    medium, boxes, faults = looked.media[image], [], []
    for found in boxes_in(looked.answer):
        if isinstance(found, NamedBox):
            boxes.append(found)
        else:
            faults.append(say(language, f"fault_{found.fault}", text=found.text))
    if not boxes:
        return "".join(map(told_html, faults or [say(language, "no_boxes")]))
    if isinstance(medium, Image.Image):
        view = view_of_processor(processor, medium, looked.num_images)
        padded = isinstance(view.tiling, PadTiling)
        shown = canvas_box(medium.size, view.tiling, view.view_size, (1, 1)) if padded else None
        where = say(language, "picture_number", number=image + 1)
        return _drawn(medium, boxes, shown, where, faults, language)
    frames, timeless = _by_frame(looked.answer, boxes, medium)
    size, pads = medium.frames[0].size, processor.pads_frames
    shown = canvas_box(size, PadTiling(), processor.view_size, (1, 1)) if pads else None
    html = ""
    for frame, its in sorted(frames.items()):
        time = f"{medium.times[frame]:.1f}"
        where = say(language, "frame_of_video", number=image + 1, seconds=time)
        html += _drawn(medium.frames[frame], its, shown, where, [where], language)
    told = [*faults, *([say(language, "boxes_without_time")] if timeless else [])]
    return html + "".join(map(told_html, told))


def _by_frame(
    answer: str, boxes: Sequence[NamedBox], video: SampledVideo
) -> tuple[dict[int, list[NamedBox]], bool]:
    """Return the boxes of each frame that has some, and whether others belong to no moment."""
    frames, timeless = defaultdict(list), False
    for box in boxes:
        moment = moment_of(answer, box.place)
        frame = nearest_frame(video.times, video.duration, moment)
        timeless = timeless or frame is None
        if frame is not None:
            frames[frame].append(box)
    return frames, timeless


def _drawn(
    picture: Image.Image,
    boxes: Sequence[NamedBox],
    shown: Corners | None,
    where: str,
    captions: Sequence[str],
    language: str,
) -> str:
    """Return a picture with boxes on it, and what is to be said of them.

    Args:
        picture: or a frame.
        boxes: of the answer.
        shown: what the model takes for the picture, as `on_image` has it.
        where: what the picture is, for who cannot see.
        captions: what else is said.
        language: of the page.
    """
    drawn, captions = [], list(captions)
    for box in boxes:
        placed = on_image(box.corners, picture.size, shown)
        if placed is None:
            text = ", ".join(f"{side:.2f}" for side in box.corners)
            captions.append(say(language, "fault_padding", text=f"[{text}]"))
        else:
            drawn.append((placed, box.name))
    if not drawn:
        return "".join(map(told_html, captions))
    names = [f"{number} {name}".strip() for number, (_, name) in enumerate(drawn, 1)]
    if shown is not None and picture.width != picture.height:
        captions.append(say(language, "boxes_padded"))
    alt = say(language, "boxes_alt", where=where, names=", ".join(names))
    figure = draw_boxes(picture, [place for place, _ in drawn])
    return as_html(figure, alt, [" · ".join(names), *captions])
