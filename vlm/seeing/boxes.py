"""Which boxes does an answer name, in the formats that vision-language models write?

| format                                         | numbers                  | models             |
|------------------------------------------------|--------------------------|--------------------|
| `[x1, y1, x2, y2]`                             | 0 to 1                   | LLaVA, Shikra      |
| `[[x1,y1,x2,y2]]`, more split by `;` or `],[`  | 0 to 1000, or 0 to 1     | InternVL, CogVLM   |
| `(x1,y1),(x2,y2)`                              | 0 to 1000                | Qwen-VL, Qwen2-VL  |
| `<loc0001>` four times: y1 x1 y2 x2, the name  | of 1024 (four digits)    | PaliGemma          |
| the name, `<loc_1>` four times: x1 y1 x2 y2    | of 1000                  | Florence-2         |
| `{"bbox_2d": [x1, y1, x2, y2], "label": name}` | 0 to 1000                | Qwen3-VL           |

Around the second and third may stand `<box>`, and `<ref>name</ref>` before them. These are special
tokens to some tokenizers and are gone then: the numbers are read without them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Fault = Literal["count", "range", "empty", "padding"]
Corners = tuple[float, float, float, float]

NUMBER = r"\d+(?:\.\d+)?"
NUMBERS = rf"[\s(]*-?{NUMBER}(?:[\s,;()]+-?{NUMBER})*[\s)]*"
PAIRS = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)\s*,?\s*\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)"
FORMS = re.compile(
    rf"(?P<loc4>(?:<loc\d{{4}}>\s*)+)"
    rf"|(?P<loc_>(?:<loc_\d+>\s*)+)"
    rf"|(?P<json>[\"']bbox(?:_2d)?[\"']\s*:\s*\[{NUMBERS}\])"
    rf"|(?P<double>\[\s*\[{NUMBERS}\](?:\s*,?\s*\[{NUMBERS}\])*\s*\])"
    rf"|(?P<single>\[{NUMBERS}\])"
    rf"|(?P<pairs>{PAIRS})"
    r"|(?P<tagged><box>(?:(?!<box>).)*?</box>)",
    re.S,
)
REF = re.compile(
    r"(?:<ref>|<\|object_ref_start\|>)(.*?)(?:</ref>|<\|object_ref_end\|>)"
    r"\s*(?:<box>|<\|box_start\|>)?\s*$",
    re.S,
)
LABEL = re.compile(r"[\"']label[\"']\s*:\s*[\"']([^\"']*)")
LOC_NAME = re.compile(r"\s*([^<;]*)")
MAX_NAME = 40  # characters of a name


@dataclass(frozen=True)
class NamedBox:
    """A box: left, top, right, bottom in 0..1 of what the model takes for the picture."""

    corners: Corners
    name: str = ""
    place: int = field(default=0, compare=False)  # in the answer, where what names it begins


@dataclass(frozen=True)
class NotABox:
    """Something that looks like a box and is none: how it is written, and why."""

    text: str
    fault: Fault


def boxes_in(answer: str) -> list[NamedBox | NotABox]:
    """Return what looks like a box in an answer, in order."""
    found: list[NamedBox | NotABox] = []
    after = 0
    for match in FORMS.finditer(answer):
        form = match.lastgroup or ""
        name = _name(answer, after, match, form)
        for numbers, written, scale in _candidates(match[0], form):
            box = _box(numbers, written, scale, form, name)
            found.append(box if isinstance(box, NotABox) else replace(box, place=match.start()))
        after = match.end()
    return found


def _candidates(text: str, form: str) -> Iterator[tuple[list[float], str, float]]:
    """Yield the numbers of each box in a piece of an answer, how it is written, and their scale."""
    if form in ("loc4", "loc_"):
        numbers = [float(number) for number in re.findall(r"\d+", text)]
        written = re.findall(r"<[^>]*>", text)
        for start in range(0, len(numbers), 4):
            yield (
                numbers[start : start + 4],
                "".join(written[start : start + 4]),
                1024.0 if form == "loc4" else 1000.0,
            )
        return
    if form == "tagged" and (inside := FORMS.search(text, 5, len(text) - 6)):
        yield from _candidates(inside[0], inside.lastgroup or "")
        return
    if form == "json":
        text = text[text.index("[") :]
    lists = re.split(r";|\]\s*,?\s*\[", text) if form == "double" else [text]
    for one in lists:
        numbers = [float(number) for number in re.findall(rf"-?{NUMBER}", one)]
        if form == "single" and len(numbers) != 4:
            continue  # a reference or a list of something else
        scale = 1.0 if form == "single" or max(numbers, default=0) <= 1 else 1000.0
        yield numbers, one.strip() if len(lists) == 1 else f"[{one.strip(' []')}]", scale


def _box(
    numbers: list[float], written: str, scale: float, form: str, name: str
) -> NamedBox | NotABox:
    """Return a box of four numbers, or what is wrong with them."""
    if len(numbers) != 4:
        return NotABox(written, "count")
    if min(numbers) < 0 or max(numbers) > scale:
        return NotABox(written, "range")
    if form == "loc4":  # rows before columns
        numbers = [numbers[1], numbers[0], numbers[3], numbers[2]]
    left, top, right, bottom = (number / scale for number in numbers)
    if right <= left or bottom <= top:
        return NotABox(written, "empty")
    return NamedBox((left, top, right, bottom), name)


def _name(answer: str, after: int, match: re.Match[str], form: str) -> str:
    """Return what a box is called: `<ref>` before it, or the text that its format has it beside."""
    before = answer[after : match.start()]
    if form == "loc4":
        behind = LOC_NAME.match(answer, match.end())
        name = behind[1] if behind else ""
    elif form == "loc_":
        name = re.sub(r"<[^>]*>", " ", before)
    elif form == "json":  # in the same object
        start, end = answer.rfind("{", 0, match.start()), answer.find("}", match.end())
        label = LABEL.search(answer, max(start, 0), end if end >= 0 else len(answer))
        name = label[1] if label else ""
    else:
        tagged = REF.search(before)
        name = tagged[1] if tagged else ""
    return " ".join(name.split())[:MAX_NAME].strip(" ,;.")


def on_image(
    corners: Corners, image_size: tuple[int, int], shown: Corners | None = None
) -> Corners | None:
    """Return a box in pixels of the image; None where it lies in the padding alone.

    Args:
        corners: in 0..1.
        image_size: (width, height) in pixels.
        shown: what the model takes for the picture, in pixels of the image: `canvas_box` of a
            padded square, from which coordinates are counted then; None: the image.
    """
    width, height = image_size
    left, top, right, bottom = shown or (0.0, 0.0, float(width), float(height))
    across, down = right - left, bottom - top
    x1, x2 = (min(max(left + x * across, 0.0), width) for x in (corners[0], corners[2]))
    y1, y2 = (min(max(top + y * down, 0.0), height) for y in (corners[1], corners[3]))
    return None if x2 <= x1 or y2 <= y1 else (x1, y1, x2, y2)
