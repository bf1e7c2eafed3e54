"""How does the page look, and which handler serves which part of it?

`build_page` mounts everything; a panel beside the chat is a function that takes the `Page`.
"""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from demo.camera import mount_camera
from demo.comparing import mount_comparing
from demo.handlers import Handlers, stop
from demo.labels import Labels
from demo.page_parts import ALWAYS, AT_ONCE, Page
from demo.sample_questions import cards
from demo.saving import mount_saving
from demo.seeing.panel import mount_seeing
from demo.talk import Served
from demo.told import language

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
# A server that was started anew under an open page does not have the conversation that is shown.
COUNT_SEEN = """(box, system, talk) =>
    [box, system, talk, document.querySelectorAll("#chat .message").length]"""


def build_page(served: Served) -> gr.Blocks:
    """Return the page, which `demo.server` serves."""
    labels = Labels()

    def leave(request: gr.Request) -> None:
        served.talks.leave(request.session_hash)

    with gr.Blocks(title=f"{served.name} - vlm", analytics_enabled=False) as blocks:
        talk = gr.State(None, delete_callback=served.talks.forget)
        with gr.Row(elem_id="bar") as bar:
            gr.HTML(_title(served), elem_id="title", padding=False)
            new_chat = labels.new(
                gr.Button, {"value": "new_chat"}, size="sm", scale=0, elem_id="new-chat"
            )
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, elem_id="talk"):
                with gr.Row(elem_id="chats") as chats, gr.Column(min_width=0):
                    if served.other is not None:
                        gr.HTML(f"<h2>{html.escape(served.name)}</h2>", padding=False)
                    chatbot = _chatbot(labels)
                with gr.Column(scale=0, elem_id="above-box") as above_box:
                    pass
                box = _question_box(labels)
            with gr.Column(scale=2, elem_id="beside", visible=False) as beside:
                pass
        system, settings = _settings(labels)
        page = Page(
            *(served, labels, talk, chatbot, box, system, settings),
            *(chats, bar, above_box, beside),
        )
        handlers = Handlers(served)
        posts, answered, cleared = _wire(page, handlers, new_chat)
        second = mount_comparing(page, posts, answered, cleared)
        mount_saving(page, handlers, second)
        mount_camera(page)
        mount_seeing(page, answered)
        blocks.load(labels.in_language, None, labels.components, **ALWAYS)
        blocks.unload(leave)
        blocks.load(_cards_in_language, None, chatbot, **ALWAYS)
    return blocks


def _title(served: Served) -> str:
    """Return the heading; two models' names stand over their conversations, and here unseen."""
    if served.other is None:
        return f"<h1>{html.escape(served.name)}</h1>"
    both = html.escape(f"{served.name} · {served.other.name}")
    return f'<h1 class="both">{both}</h1>'


def _cards_in_language(request: gr.Request) -> gr.Chatbot:
    return gr.Chatbot(examples=cards(language(request)))


def _chatbot(labels: Labels) -> gr.Chatbot:
    return labels.new(
        gr.Chatbot,
        {"label": "conversation", "placeholder": "greeting"},
        elem_id="chat",
        show_label=False,
        height="100%",
        layout="bubble",
        buttons=["copy"],
        editable="user",
        group_consecutive_messages=False,
        allow_tags=False,
        latex_delimiters=[],
        allow_file_downloads=False,
        examples=cards("en"),
    )


def _question_box(labels: Labels) -> gr.MultimodalTextbox:
    return labels.new(
        gr.MultimodalTextbox,
        {"label": "ask", "placeholder": "ask"},
        elem_id="box",
        show_label=False,
        sources=["upload"],
        file_types=["image", "video"],
        file_count="multiple",
        autofocus=True,
        max_plain_text_length=10**6,  # a longer text that is pasted would become a file
    )


def _settings(labels: Labels) -> tuple[gr.Textbox, list[Component]]:
    """Mount the sidebar; return the system prompt and what `Handlers.answer` takes, in order."""
    with gr.Sidebar(position="right", open=False, elem_id="settings"):
        labels.new(gr.Markdown, {"value": "settings"})
        system = labels.new(
            gr.Textbox, {"label": "system", "info": "system_info"}, lines=2, elem_id="system"
        )
        about_heat = {"label": "temperature", "info": "temperature_info"}
        about_beams = {"label": "beams", "info": "beams_info"}
        settings: list[Component] = [
            labels.new(gr.Slider, about_heat, 0, 2, 0, step=0.05, elem_id="temperature"),
            labels.new(gr.Slider, {"label": "top_p"}, 0.05, 1, 1, step=0.05, elem_id="top-p"),
            labels.new(gr.Slider, {"label": "longest"}, 1, 2048, 256, step=1, elem_id="longest"),
            labels.new(gr.Slider, about_beams, 1, 8, 1, step=1, elem_id="beams"),
        ]
    return system, settings


def _wire(
    page: Page, handlers: Handlers, new_chat: gr.Button
) -> tuple[list[Dependency], list[Dependency], list[Callable[..., Any]]]:
    """Connect the parts with their handlers.

    Returns:
        the events that put questions, those that give answers, and what begins a new chat.
    """
    talk, chatbot, box = page.talk, page.chatbot, page.box
    asked = [talk, chatbot, box]
    num_seen = gr.Number(0, visible="hidden")  # set by the browser as it posts
    question = [box, page.system, talk, num_seen]
    edited = chatbot.edit(handlers.edit, talk, asked, **AT_ONCE)
    edited.failure(handlers.show_again, talk, chatbot, **ALWAYS)
    posts = [
        box.submit(handlers.post, question, asked, js=COUNT_SEEN, **AT_ONCE),
        chatbot.retry(handlers.retry, talk, asked, **AT_ONCE),
        edited,
        chatbot.example_select(handlers.sample, [page.system, talk], asked, **AT_ONCE),
    ]
    given = []
    for posted in posts:
        answered = posted.success(
            handlers.answer,
            [talk, *page.settings],
            [chatbot, box],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=[chatbot],
            api_visibility="private",
        )
        answered.failure(handlers.take_back, talk, [chatbot, box], **ALWAYS)
        given.append(answered)
    box.stop(stop, talk, None, **ALWAYS)
    cleared: list[Callable[..., Any]] = [new_chat.click, chatbot.clear]
    for event in cleared:
        event(handlers.new_chat, talk, asked, **ALWAYS)
    return posts, given, cleared
