"""How does a picture or a film from the camera get into the question box?"""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from demo.handlers import idle_box
from demo.page_parts import AT_ONCE, Page

# Models look at frames of a few hundred pixels; a camera's largest would fill the upload's limit in
# a minute. Without `audio` a browser would ask for the microphone too.
FILM = {"video": {"width": {"ideal": 1280}, "height": {"ideal": 720}}, "audio": False}


def mount_camera(page: Page) -> None:
    """Add the button "Camera" to the bar, and the camera above the question box."""
    with page.bar:
        toggle = page.labels.new(
            gr.Button, {"value": "camera"}, size="sm", scale=0, elem_id="camera-button"
        )
    with page.above_box, gr.Row(visible=False, elem_id="camera") as both:
        photo = page.labels.new(
            gr.Image,
            {"label": "picture"},
            sources=["webcam"],
            type="filepath",
            format="png",
            webcam_options=gr.WebcamOptions(mirror=False),
            height=280,
            elem_id="photo",
        )
        film = page.labels.new(
            gr.Video,
            {"label": "film"},
            sources=["webcam"],
            include_audio=True,  # or gradio takes it out by ffmpeg, a program that may not be there
            webcam_options=gr.WebcamOptions(mirror=False, constraints=FILM),
            height=280,
            elem_id="film",
        )
    is_open = gr.State(False)

    def switch(was_open: bool) -> list[Any]:
        return [not was_open, gr.update(visible=not was_open), None, None]

    def take(taken: str | None, question: Mapping[str, Any]) -> list[Any]:
        if taken is None:
            return [gr.skip()] * 5
        box = idle_box(question["text"], [*question["files"], taken])
        return [box, False, gr.update(visible=False), None, None]

    parts = [is_open, both, photo, film]
    toggle.click(switch, is_open, parts, **AT_ONCE)
    photo.input(take, [photo, page.box], [page.box, *parts], **AT_ONCE)
    film.stop_recording(take, [film, page.box], [page.box, *parts], **AT_ONCE)
