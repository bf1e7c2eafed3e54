"""How does a conversation become text, with the spans of it that a model is trained to say?

messages = [{"role": "system" | "user" | "assistant", "content": [{"type": "image"}, {"type":
"text", "text": "..."}]}]; images stand in the order of their entries, and so do videos, whose
entries are {"type": "video"}. To a template a video is an image: both are one image token in it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from vlm.errors import UserError

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the (start, end) characters that are supervised."""

    text: str
    spans: tuple[tuple[int, int], ...]


def check_messages(
    messages: Sequence[Message], image_token: str, num_images: int, num_videos: int
) -> list[dict]:
    """Return the messages with every content as a list of entries.

    Raises:
        UserError: no messages, an unknown role or entry, a text that contains the image token, or
            another number of image or video entries than of images or videos.
    """
    if not messages:
        raise UserError("the conversation is empty: it needs at least one message")
    checked = [_check_message(i, message, image_token) for i, message in enumerate(messages)]
    for kind, count in (("image", num_images), ("video", num_videos)):
        placeholders = kinds_shown(checked).count(kind)
        if placeholders != count:
            raise UserError(
                f"the conversation has {placeholders} {kind} placeholders but {count} {kind}s; "
                f'give one {{"type": "{kind}"}} entry per {kind}'
            )
    return checked


def kinds_shown(messages: Sequence[Message]) -> list[str]:
    """Return "image" or "video" for each placeholder of checked messages, in order."""
    kinds = [entry["type"] for message in messages for entry in message["content"]]
    return [kind for kind in kinds if kind != "text"]


def videos_as_images(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return checked messages with image entries in place of videos', as templates know them."""
    return [
        {
            **message,
            "content": [
                {"type": "image"} if entry["type"] == "video" else entry
                for entry in message["content"]
            ],
        }
        for message in messages
    ]


def in_order(
    checked: Sequence[dict[str, Any]], images: Sequence[Any], videos: Sequence[Any]
) -> list[Any]:
    """Return what stands for images and for videos as one list, in the placeholders' order."""
    queues = {"image": iter(images), "video": iter(videos)}
    return [next(queues[kind]) for kind in kinds_shown(checked)]


def check_length(
    checked: Sequence[dict[str, Any]], length: int, counts: Sequence[int], max_length: int | None
) -> None:
    """Refuse a conversation that is too long; nothing is ever truncated.

    Args:
        checked: its messages.
        length: its tokens.
        counts: of these, the tokens of each image or video.
        max_length: most tokens allowed; None: any number.

    Raises:
        UserError: it has more.
    """
    if max_length is None or length <= max_length:
        return
    kinds = set(kinds_shown(checked))
    called = "images and videos" if len(kinds) == 2 else f"{next(iter(kinds), 'image')}s"
    raise UserError(
        f"the conversation takes {length} tokens ({sum(counts)} of them for {len(counts)} "
        f"{called}), more than {max_length}, the least of max_length, packed.length and the "
        "language model's own limit; raise that (rope_factor the last), or choose a tiling "
        "or connector with fewer tokens",
        "conversation_long",
        length=length,
        limit=max_length,
    )


def _check_message(index: int, message: Message, image_token: str) -> dict[str, Any]:
    """Return one message with its content as a list of entries."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message {index} has the role {role!r}; choose from {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise UserError(
            f"message {index} ({role}) needs a content: a string or a list of entries, "
            f"not {content!r}"
        )
    for entry in content:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        is_text = kind == "text" and isinstance(entry.get("text"), str)
        if not is_text and kind not in ("image", "video"):
            raise UserError(
                f'message {index} ({role}) has the entry {entry!r}; allowed are {{"type": "image"}}'
                ', {"type": "video"} and {"type": "text", "text": "..."}'
            )
        if is_text and image_token in entry["text"]:
            raise UserError(
                f"message {index} ({role}) has the image token {image_token!r} in its text: "
                f"{entry['text'][:60]!r}; give images as entries of type image, or write it "
                "otherwise",
                "image_token",
                token=image_token,
            )
    return {"role": role, "content": list(content)}


def render(
    messages: Sequence[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    image_token: str,
    supervise: bool,
    add_generation_prompt: bool,
) -> Rendered:
    """Return checked messages as text; with `supervise`, the marked spans too.

    Raises:
        UserError: `supervise` and no assistant turn, or no marks in the template; or the template
            cannot take this conversation.
    """
    if supervise:
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("the conversation has no assistant turn, so there is nothing to learn")
        if not marks_generation(template):
            raise UserError(
                "the chat template has no {% generation %} marks, so what to learn is unknown; set "
                "chat_template in the recipe's model, such as chatml"
            )
    if not takes_entries(template, image_token):
        messages = [{**m, "content": flatten(m["content"], image_token)} for m in messages]
    text, spans = _render_one(messages, template, special_tokens, supervise, add_generation_prompt)
    return Rendered(text, tuple((start, end) for start, end in spans))


def marks_generation(template: str) -> bool:
    """Return whether the template marks what the assistant says."""
    return _GENERATION_MARK.search(template) is not None


def flatten(content: Sequence[Mapping[str, str]], image_token: str) -> str:
    """Return a content as one string, for the templates of text-only language models."""
    text, leading = "", True
    for position, entry in enumerate(content):
        if entry["type"] == "image":
            text += image_token + ("\n" if leading else "")
        else:
            text += entry["text"].lstrip("\n") if leading and position else entry["text"]
            leading = False
    return text


@lru_cache(maxsize=32)
def takes_entries(template: str, image_token: str) -> bool:
    """Return whether a template understands contents that are lists of image and text entries."""
    content = [{"type": "image"}, {"type": "text", "text": "probe"}]
    flat = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "reply"}]
    listed = [{"role": "user", "content": content}, {"role": "assistant", "content": content[1:]}]
    tokens = {"bos_token": "", "eos_token": ""}
    try:
        _render_one(flat, template, tokens, False, False)
        text, _ = _render_one(listed, template, tokens, False, False)
    except (UserError, TypeError):
        return False  # it joins strings
    return text.count(image_token) == 1 and "'type'" not in text


def _render_one(
    messages: Sequence[dict[str, Any]],
    template: str,
    special_tokens: Mapping[str, Any],
    supervise: bool,
    add_generation_prompt: bool,
) -> tuple[str, list[list[int]]]:
    """Run Jinja on one conversation."""
    try:
        texts, spans = render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=supervise,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], spans[0] if supervise else []  # pyright: ignore[reportReturnType]


def tokens_in_spans(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Return (L,) whether each token has a character inside one of the spans."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside
