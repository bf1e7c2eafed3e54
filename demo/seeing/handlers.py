"""What happens when a visitor opens the panel, asks while it is open, or chooses another word?

Looking runs the model and waits in its queue; drawing does not.
"""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from demo.seeing.answer_boxes import boxes_html
from demo.seeing.looked import Choice, Looked, heat_html, options_html, tiles_html
from demo.seeing.pictures import told_html
from demo.talk import Served, Talk
from demo.told import language, told
from demo.wording import say
from vlm.image_processing import Medium
from vlm.seeing.answer_attention import AnswerAttention, Views, answer_attention, why_no_map
from vlm.seeing.option_depth import OptionDepth, option_depth, question_options
from vlm.video import SampledVideo

ALL = -1  # of a layer or a head: the mean of all


class Seeing:
    """The panel's event handlers."""

    def __init__(self, served: Served) -> None:
        """Look with one model."""
        self.served = served
        self._drawing = threading.Lock()  # matplotlib draws one figure at a time
        self.look, self.draw = told(self._look), told(self._draw)

    def _look(self, is_open: bool, talk: Talk | None, request: gr.Request) -> list[Any]:
        """Look at the last answer.

        Returns:
            what was looked at; updates of the choices: words, picture, layer, head, views; the HTML
            of attention, tiles, boxes and options.
        """
        words = language(request)
        messages = [] if talk is None else copy.deepcopy(talk.chat.messages)
        answer = _text(messages[-1]) if messages and messages[-1]["role"] == "assistant" else ""
        if not is_open or talk is None or not talk.chat.images or not answer.strip():
            return _nothing(say(words, "ask_first"))
        media = tuple(medium for _, medium in talk.chat.images)
        looked = Looked(
            media,
            answer,
            self._attention(messages, media),
            self._options(messages, media),
        )
        last = len(media) - 1
        drawn = self._draw_all(looked, last, Choice(), words)
        with self._drawing:
            options = options_html(looked, words)
        return [looked, *_choices(looked, last, words), *drawn, options]

    def _attention(self, messages: list, media: Sequence[Medium]) -> AnswerAttention | str:
        reason = why_no_map(self.served.model)
        if reason is not None:
            return reason
        parts = (self.served.model, self.served.processor)
        return answer_attention(*parts, messages, *_apart(media))

    def _options(self, messages: list, media: Sequence[Medium]) -> OptionDepth | str:
        if not question_options(_text(messages[-2])):
            return "no_options"
        parts = (self.served.model, self.served.processor)
        return option_depth(*parts, messages, *_apart(media))

    def _draw(
        self,
        looked: Looked | None,
        words: list[int],
        picture: int,
        layer: int,
        head: int,
        views: Views,
        request: gr.Request,
    ) -> list[Any]:
        """Return attention, tiles and boxes as chosen."""
        if looked is None:
            return [gr.skip()] * 3
        choice = Choice(
            sorted(words),
            None if layer == ALL else layer,
            None if head == ALL else head,
            views,
        )
        return self._draw_all(looked, picture, choice, language(request))

    def _draw_all(self, looked: Looked, picture: int, choice: Choice, words: str) -> list[str]:
        cutter = self.served.processor.image_processor
        with self._drawing:
            return [
                heat_html(looked, picture, choice, words),
                tiles_html(looked, picture, cutter, words),
                boxes_html(looked, picture, cutter, words),
            ]


def _apart(media: Sequence[Medium]) -> tuple[list[Image.Image], list[SampledVideo]]:
    """Return pictures and videos, each in order."""
    images = [medium for medium in media if isinstance(medium, Image.Image)]
    return images, [medium for medium in media if isinstance(medium, SampledVideo)]


def _nothing(sentence: str) -> list[Any]:
    """Return what `look` gives where there is nothing to see, and why."""
    return [None, *[gr.update(visible=False)] * 5, *[told_html(sentence)] * 4]


def _choices(looked: Looked, picture: int, words: str) -> list[dict[str, Any]]:
    """Return the updates of what can be chosen: words, picture, layer, head, views."""
    pictures = [(str(number + 1), number) for number in range(len(looked.media))]
    of_picture = gr.update(choices=pictures, value=picture, visible=len(pictures) > 1)
    attention = looked.attention
    if isinstance(attention, str):
        hidden = gr.update(visible=False)
        return [hidden, of_picture, hidden, hidden, hidden]
    said = [(word.text, number) for number, word in enumerate(attention.words)]
    num_layers, num_heads = attention.weights.shape[:2]
    layers = [(str(n + 1), n) for n in range(num_layers)]
    heads = [(str(n + 1), n) for n in range(num_heads)]
    views = [(say(words, f"views_{name}"), name) for name in ("all", "whole", "tiles")]
    has_both = any(bool(places.whole.any()) for places in attention.places)
    return [
        gr.update(choices=said, value=[], visible=True),
        of_picture,
        gr.update(choices=[(say(words, "mean_of_layers"), ALL), *layers], value=ALL, visible=True),
        gr.update(
            choices=[(say(words, "mean_of_heads"), ALL), *heads], value=ALL, visible=num_heads > 1
        ),
        gr.update(choices=views, value="all", visible=has_both),
    ]


def _text(message: dict[str, Any]) -> str:
    return "".join(entry["text"] for entry in message["content"] if entry["type"] == "text")
