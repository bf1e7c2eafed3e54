"""How do other suites write the same record? Their keys, told apart here, as turns and pictures.

    pictures  `image`: a path, a list of paths, or MiniCPM's {"<image_00>": path}; `images`
              (ms-swift, nanoVLM)
    videos    `video`: a path (of a file, or of a folder of frames) or a list of paths; `videos`
              (ms-swift); a list of pictures is one video of these frames, also within a list
    turns     `conversations` (LLaVA, InternVL, MiniCPM), `messages` (ms-swift, OpenAI), or
              `texts`: [{"user": ..., "assistant": ...}] (nanoVLM, FineVision)
    a turn    {"from", "value"} or {"role", "content"}; a content is text, or a list of entries
              {"type": "text", "text": ...}, {"type": "image"}, {"type": "image", "image": path} and
              {"type": "image_url", "image_url": {"url": path}}, and the same of videos

A picture that an entry brings with it comes where the entry stands. What means something that is
not done yet (parts of videos, sounds, boxes) is refused, not ignored, and so is what looks
like a picture's key (`imgs`) in a record without pictures; other keys are ignored.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from data_recipes.image_files import Inside
from vlm.errors import UserError
from vlm.frame_files import is_frame_name

IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
PICTURE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")
TURN_KEYS = ("conversations", "messages", "texts", "caption")
REFUSED = {
    "clip": "a part of a video ('clip') cannot be taken; cut the file",
    "audios": "sounds cannot be trained on",
    "objects": "boxes in 'objects' are not written into the text; write them there",
}
KEYS = ("id", *PICTURE_KEYS, *VIDEO_KEYS, *TURN_KEYS, *REFUSED)
TAG = re.compile(r"<image_\d+>")
# Qwen-VL's own form; HTML has no </img>.
PATH_IN_TEXT = re.compile(r"<img>[^<>\s]+</img>")
# Keys of other people that are read by nobody: the picture would be lost without a word.
LOOKALIKES = frozenset(
    f"{thing}{ending}"
    for thing in ("image", "img", "picture", "photo", "video")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls", "_name")
).difference(PICTURE_KEYS, VIDEO_KEYS)


def media_and_turns(raw: Mapping, name: object) -> tuple[list[Any], list[Any], Any]:
    """Return a record's pictures, videos and turns, each as LLaVA writes them.

    Args:
        raw: the record.
        name: what errors call it.

    Returns:
        Paths, or whatever stands for pictures; the same of videos, tuples of frames among them; and
        the turns, of which only what had to be read was checked.

    Raises:
        UserError: two keys for one thing, or something that cannot be trained on.
    """
    for key, why in REFUSED.items():
        if raw.get(key):
            raise UserError(f"{name}: {why}; remove this record")
    images, videos = _only(raw, PICTURE_KEYS, name), _only(raw, VIDEO_KEYS, name)
    turns = _only(raw, TURN_KEYS[:3], name)
    if isinstance(turns, list):
        if raw.get("texts"):
            turns = [turn for pair in turns for turn in _pair(pair, name)]
        if isinstance(images, Mapping):
            images, turns = _tagged(images, turns, name)
        brought: dict[str, list[Any]] = {"image": [], "video": []}
        turns = [_joined(turn, brought, name) for turn in turns]
        if (brought["image"] and images) or (brought["video"] and videos):
            kind = "pictures" if brought["image"] and images else "videos"
            raise UserError(f"{name}: its {kind} stand in its turns and beside them; choose one")
        images = brought["image"] or images
        if brought["video"]:
            return _listed(images), list(map(_video, brought["video"])), turns
    if not images and not videos:
        _refuse_lookalikes(raw, name)
    return _listed(images), _videos(videos), turns


def _refuse_lookalikes(raw: Mapping, name: object) -> None:
    """Refuse keys under which a record without pictures and videos may have some."""
    for key, value in raw.items():
        known, lower = (*PICTURE_KEYS, *VIDEO_KEYS), str(key).lower()
        if value and key not in known and (lower in LOOKALIKES or lower in known):
            right = "video" if lower.startswith("video") else "image"
            raise UserError(f"{name}: the key {key!r} is not read; call it {right!r}, or remove it")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _videos(value: Any) -> list[Any]:
    """Return a record's videos; a list of pictures is one."""
    if isinstance(value, list) and value and all(map(is_frame, value)):
        return [_video(value)]
    return list(map(_video, _listed(value)))


def _video(value: Any) -> Any:
    """Return a video, its frames as a tuple where they are a list."""
    return tuple(value) if isinstance(value, list) else value


def is_frame(file: Any) -> bool:
    """Return whether a file is a picture, by its name."""
    name = file.name if isinstance(file, Inside) else file
    return isinstance(name, str) and is_frame_name(name)


def show(value: Any) -> str:
    """Return a value for a sentence, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _only(raw: Mapping, keys: tuple[str, ...], name: object) -> Any:
    """Return the value of the one key that is there, None where none is."""
    given = [key for key in keys if raw.get(key) is not None]
    if len(given) > 1:
        raise UserError(f"{name}: has {given[0]!r} and {given[1]!r}, which mean the same; keep one")
    return raw[given[0]] if given else None


def _pair(pair: Any, name: object) -> list[dict[str, Any]]:
    """Return a question and its answer as two turns."""
    if not isinstance(pair, Mapping) or not {"user", "assistant"} <= set(pair):
        raise UserError(f"{name}: an entry of 'texts' needs 'user' and 'assistant': {show(pair)}")
    return [{"role": role, "content": pair[role]} for role in ("user", "assistant")]


def _tagged(images: Mapping, turns: list[Any], name: object) -> tuple[list[Any], list[Any]]:
    """Return MiniCPM's pictures by tag as a list, and turns in which every tag is a placeholder."""
    used: list[str] = []

    def one(turn: Any) -> Any:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            return turn
        used.extend(TAG.findall(turn["content"]))
        return {**turn, "content": TAG.sub(IMAGE_PLACEHOLDER, turn["content"])}

    replaced = [one(turn) for turn in turns]
    wrong = [tag for tag in images if tag not in used] + [tag for tag in used if tag not in images]
    if wrong:
        raise UserError(f"{name}: {wrong[0]} is not both a key of 'image' and a tag of a turn")
    return [images[tag] for tag in used], replaced


def _joined(turn: Any, brought: dict[str, list[Any]], name: object) -> Any:
    """Return a turn whose content is a list of entries with one text; add what they bring to lists.

    A turn of any other form is returned as it is.
    """
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
        return turn
    text = ""
    for entry in turn["content"]:
        match entry:
            case {"type": "text", "text": str(piece)}:
                text += piece
            case {"type": "image", "image": file} | {
                "type": "image_url",
                "image_url": {"url": file},
            }:
                text, _ = text + IMAGE_PLACEHOLDER, brought["image"].append(file)
            case {"type": "video", "video": file} | {
                "type": "video_url",
                "video_url": {"url": file},
            }:
                text, _ = text + VIDEO_PLACEHOLDER, brought["video"].append(file)
            case {"type": "image"}:
                text += IMAGE_PLACEHOLDER
            case {"type": "video"}:
                text += VIDEO_PLACEHOLDER
            case _:
                raise UserError(f"{name}: a turn has the entry {show(entry)}, which is not read")
    return {**turn, "content": text}
