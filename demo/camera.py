"""How does a picture from the camera get into the question box?"""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from demo.handlers import idle_box
from demo.page_parts import AT_ONCE, Page


def mount_camera(page: Page) -> None:
    """Add the button "Camera" to the bar, and the camera's picture above the question box."""
    with page.bar:
        toggle = page.labels.new(
            gr.Button, {"value": "camera"}, size="sm", scale=0, elem_id="camera-button"
        )
    with page.above_box:
        camera = page.labels.new(
            gr.Image,
            {"label": "camera"},
            sources=["webcam"],
            type="filepath",
            format="png",
            webcam_options=gr.WebcamOptions(mirror=False),
            visible=False,
            height=320,
            elem_id="camera",
        )
    is_open = gr.State(False)

    def switch(was_open: bool) -> tuple[bool, dict[str, Any]]:
        return not was_open, gr.update(visible=not was_open, value=None)

    def take(
        picture: str | None, question: Mapping[str, Any]
    ) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        if picture is None:
            return True, gr.skip(), gr.skip()
        box = idle_box(question["text"], [*question["files"], picture])
        return False, gr.update(visible=False, value=None), box

    toggle.click(switch, is_open, [is_open, camera], **AT_ONCE)
    camera.input(take, [camera, page.box], [is_open, camera, page.box], **AT_ONCE)
