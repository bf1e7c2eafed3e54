"""Which parts does the page have that a panel may read or be mounted in?"""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from demo.labels import Labels
from demo.talk import Served

# Of events that do not wait for the model. They go through the queue all the same: only there does
# gradio show their errors.
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Of events that must come through when the queue is full, and cannot fail.
ALWAYS: dict[str, Any] = AT_ONCE | {"queue": False}


@dataclass(frozen=True)
class Page:
    """The parts that panels may read, and where they go."""

    served: Served
    labels: Labels
    talk: gr.State  # a demo.talk.Talk, None before the first question
    chatbot: gr.Chatbot
    box: gr.MultimodalTextbox
    system: gr.Textbox
    settings: list[Component]  # temperature, top-p, longest reply, beams
    chats: gr.Row  # the conversations, side by side
    bar: gr.Row  # buttons that open panels are mounted in here
    above_box: gr.Column  # such as the camera's picture
    beside: gr.Column  # panels are mounted in here, and make it visible
