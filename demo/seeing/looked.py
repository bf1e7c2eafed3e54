"""What was looked at in a conversation, and how does each part of it become HTML for the page?

Each function takes what was looked at, the picture's number and the page's language, and gives a
picture with words, or a sentence that says why there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image

from demo.seeing.frames_figure import draw_frames
from demo.seeing.heat_figure import draw_heat
from demo.seeing.options_figure import draw_options
from demo.seeing.pictures import PAPER, as_html, told_html
from demo.wording import say
from vlm.answers import LETTERS
from vlm.image_processing import Medium, VlmImageProcessor
from vlm.seeing.answer_attention import AnswerAttention, Views
from vlm.seeing.heat_map import heat_map, map_size
from vlm.seeing.option_depth import OptionDepth
from vlm.tiles_figure import draw_tiles, draw_tokens, split, token_arithmetic
from vlm.tiles_view import view_of_processor
from vlm.video import SampledVideo
from vlm.video_layout import num_video_tokens, pooled_grid

MAX_BEFORE = 80  # characters of an answer that a caption repeats


@dataclass(frozen=True)
class Looked:
    """An answered question.

    Attributes:
        media: pictures and videos of the conversation.
        answer: the last one.
        attention: of its words, or the key of the sentence that says why there is none.
        options: of the question, or the key of such a sentence.
    """

    media: tuple[Medium, ...]
    answer: str
    attention: AnswerAttention | str
    options: OptionDepth | str

    @property
    def num_images(self) -> int:
        """Return how many pictures there are, on which the tilings of some models depend."""
        return sum(isinstance(medium, Image.Image) for medium in self.media)


@dataclass(frozen=True)
class Choice:
    """What of the attention is drawn; None: the mean of all."""

    words: Sequence[int] = ()
    layer: int | None = None
    head: int | None = None
    views: Views = "all"


def heat_html(looked: Looked, image: int, choice: Choice, language: str) -> str:
    """Return the attention of words over an image."""
    attention = looked.attention
    if isinstance(attention, str):
        return told_html(say(language, attention))
    weights = attention.on_image(image, choice.words, choice.layer, choice.head, choice.views)
    places, medium = attention.places[image], looked.media[image]
    pictures = [medium] if isinstance(medium, Image.Image) else list(medium.frames)
    size = map_size(pictures[0].size)
    maps = [
        heat_map(weights * (places.frame == number), places, pictures[0].size, size).cells
        for number in range(len(pictures))
    ]
    strongest = max(range(len(maps)), key=lambda number: float(maps[number].max()))
    chosen = [attention.words[number].text for number in choice.words]
    words = ", ".join(say(language, "quoted", word=word) for word in chosen)
    known = {
        "words": words or say(language, "whole_answer"),
        "place": say(language, f"place_{_ninth(maps[strongest])}"),
    }
    if isinstance(medium, SampledVideo):
        time = f"{medium.times[strongest]:.1f}"
        known["place"] = say(language, "place_in_time", place=known["place"], seconds=time)
    share = f"{float(sum(cells.sum() for cells in maps)):.0%}"
    return as_html(
        draw_heat(pictures, maps),
        say(language, "heat_alt", number=image + 1, **known),
        [say(language, "heat_caption", share=share, **known)],
    )


def _ninth(cells: torch.Tensor) -> int:
    """Return in which of three by three parts of a map its strongest place lies, row by row."""
    strongest = (cells >= cells.max() * (1 - 1e-6)).nonzero().double().mean(0)
    row, column = (3 * (strongest + 0.5) / torch.tensor(cells.shape)).long().tolist()
    return 3 * row + column


def tiles_html(looked: Looked, image: int, processor: VlmImageProcessor, language: str) -> str:
    """Return how an image is cut, and which tokens it becomes."""
    medium = looked.media[image]
    if isinstance(medium, SampledVideo):
        return _frames_html(medium, image, processor, language)
    view = view_of_processor(processor, medium, looked.num_images)
    figure = Figure(figsize=(7.0, 3.7), facecolor=PAPER)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.04)
    draw_tiles(left, view)
    draw_tokens(right, view, split(view))
    for axes in (left, right):
        axes.set_title("", loc="left")  # the caption says it, in the page's language
        axes.set_anchor("C")
    width, height = view.image.size
    rows, cols = view.plan.grid if view.plan.rows else (1, 1)
    caption = say(
        language,
        "tiles_caption",
        width=width,
        height=height,
        rows=rows,
        cols=cols,
        side=view.view_size,
        tiling=view.tiling_name,
        views=view.plan.num_views,
        arithmetic=token_arithmetic(view).replace(" x ", " × "),
    )
    alt = say(language, "tiles_alt", number=image + 1, rows=rows, cols=cols)
    ends = [say(language, "tiles_ends")] if view.tiling.has_newline else []
    return as_html(figure, alt, [caption, *ends])


def _frames_html(
    video: SampledVideo, number: int, processor: VlmImageProcessor, language: str
) -> str:
    """Return the frames of a video that the model sees, and the tokens they become."""
    figure = draw_frames(processor.frame_views(video), video.times)
    rows, cols = pooled_grid(processor.view_token_grid, processor.video_config)
    tokens = num_video_tokens(len(video.frames), processor.view_token_grid, processor.video_config)
    known = {"frames": len(video.frames), "rows": rows, "cols": cols, "tokens": tokens}
    alt = say(language, "frames_alt", number=number + 1, frames=len(video.frames))
    return as_html(figure, alt, [say(language, "frames_caption", **known)])


def options_html(looked: Looked, language: str) -> str:
    """Return how the choice among options forms."""
    options = looked.options
    if isinstance(options, str):
        return told_html(say(language, options))
    lines = options.among_options()
    ends = [
        f"({letter}) {text}: {share:.0%}"
        for letter, text, share in zip(LETTERS, options.texts, lines[-1].tolist(), strict=False)
    ]
    before = options.before.strip(" (")
    said = ""
    if before:
        cut = f"… {before[-MAX_BEFORE:]}" if len(before) > MAX_BEFORE else before
        said = say(language, "options_after", text=cut)
    caption = say(language, "options_caption", layers=len(lines) - 1, before=said)
    alt = say(language, "options_alt", ends=", ".join(ends))
    return as_html(draw_options(lines), alt, [" · ".join(ends), caption])
