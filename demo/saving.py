"""How does a visitor keep a conversation, and go on with it later?"""

import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from demo.comparing import restore
from demo.handlers import Handlers, idle_box
from demo.page_parts import AT_ONCE, Page
from demo.saved import pack, unpack
from demo.talk import Talk, shown
from demo.told import language, told
from demo.wording import say
from vlm.errors import UserError

# A browser saves what a link leads to; the link is there when the file is.
SAVE = "() => setTimeout(() => document.querySelector('#saved').click(), 50)"


def mount_saving(page: Page, handlers: Handlers, second: gr.Chatbot | None) -> None:
    """Add the buttons "Save" and "Open" to the bar; `second` shows the second conversation."""
    with page.bar:
        save = page.labels.new(gr.Button, {"value": "save"}, size="sm", scale=0, elem_id="save")
        saved = gr.DownloadButton("", visible="hidden", elem_id="saved")
        load = page.labels.new(
            gr.UploadButton,
            {"label": "open"},
            file_types=[".zip", ".json"],
            size="sm",
            scale=0,
            elem_id="open",
        )

    def write(talk: Talk | None, request: gr.Request) -> str:
        words = language(request)
        if talk is not None and talk.is_gone:
            raise UserError(say(words, "gone"))
        path = None if talk is None else talk.folder / f"conversation-{secrets.token_hex(4)}.zip"
        beside = None if talk is None else talk.beside
        own = None if beside is None or beside.taken_over else beside.chat
        if talk is None or path is None or not pack(talk.chat, path, own):
            raise UserError(say(words, "nothing_to_save"))
        return str(path)

    def read(file: str, talk: Talk | None, request: gr.Request) -> list[Any]:
        words = language(request)
        talk = handlers.open_talk(talk, request)
        if talk.is_busy:
            raise UserError(say(words, "still_answering"))
        restored = unpack(Path(file), talk.chat, talk.folder, page.served.limits, words)
        restored.put_into(talk.chat)
        system = gr.update(value=restored.system or "")
        opened = [talk, shown(talk, words), idle_box("", []), system]
        other = page.served.other
        if other is not None:
            restore(other, talk, restored.second)
        talk.tidy()
        if other is None:
            return opened
        return [*opened, shown(talk.beside, words) if talk.beside else []]

    save.click(told(write), page.talk, saved, **AT_ONCE).success(None, None, None, js=SAVE)
    asked = [page.talk, page.chatbot, page.box, page.system, *([second] if second else [])]
    load.upload(told(read), [load, page.talk], asked, **AT_ONCE)
