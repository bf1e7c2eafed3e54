"""Where on the page does it stand what the model sees? A panel beside the chat, behind a button."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.events import Dependency

from demo.page_parts import ALWAYS, AT_ONCE, Page
from demo.seeing.handlers import ALL, Seeing

OF_MODEL: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
}


def mount_seeing(page: Page, answered: Sequence[Dependency]) -> None:
    """Mount the panel and its button; look again after each answer while it is open.

    Args:
        page: where, and what is looked at.
        answered: the events that give answers.
    """
    seeing, new = Seeing(page.served), page.labels.new
    is_open, looked = gr.State(False), gr.State(None)
    with page.bar:
        button = new(gr.Button, {"value": "see"}, size="sm", scale=0, elem_id="see")
    with page.beside:
        picture = new(gr.Radio, {"label": "picture"}, [], visible=False, elem_id="seen-picture")
        with gr.Tabs(elem_id="seeing"):
            with new(gr.Tab, {"label": "attention"}, id="attention"):
                said = {"label": "words", "info": "words_info"}
                words = new(gr.CheckboxGroup, said, [], visible=False, elem_id="words")
                heat = gr.HTML(elem_id="heat", padding=False)
                with gr.Row():
                    layer, head, views = (_menu(new, name) for name in ("layer", "head", "views"))
            with new(gr.Tab, {"label": "options"}, id="options"):
                options = gr.HTML(elem_id="options", padding=False)
            with new(gr.Tab, {"label": "tiles"}, id="tiles"):
                tiles = gr.HTML(elem_id="tiles", padding=False)
            with new(gr.Tab, {"label": "boxes"}, id="boxes"):
                boxes = gr.HTML(elem_id="boxes", padding=False)
    chosen = [words, picture, layer, head, views]
    shown = [looked, *chosen, heat, tiles, boxes, options]
    toggled = button.click(_toggle, is_open, [is_open, page.beside], **ALWAYS)
    for event in (toggled, *answered):
        event.success(
            seeing.look,
            [is_open, page.talk],
            shown,
            show_progress="minimal",
            show_progress_on=[heat],
            **OF_MODEL,
        )
    for choice in chosen:
        choice.input(seeing.draw, [looked, *chosen], [heat, tiles, boxes], **AT_ONCE)


def _menu(new: Callable[..., gr.Dropdown], name: str) -> gr.Dropdown:
    """Return a menu that gets its entries with the first answer."""
    return new(
        gr.Dropdown,
        {"label": name},
        [("", ALL)],
        value=ALL,
        visible=False,
        elem_id=name,
        min_width=110,
        filterable=False,
    )


def _toggle(is_open: bool) -> tuple[bool, dict[str, Any]]:
    """Open or close the panel."""
    return not is_open, gr.update(visible=not is_open)
