"""How are tags shown that a model or a visitor wrote? As they were written, not as HTML.

Models write `<box>`, `<ref>`, `<b>` or whole tables; gradio's Markdown would draw or drop them. An
entity for `<` would itself be shown inside code, so an unseen word joiner is put behind it: then it
begins no tag, in code or out of it, and the rest of the Markdown is untouched. `demo/page.js` takes
it out of what is copied.
"""

import re

JOINER = "\u2060"
TAG = re.compile(r"<(?=[A-Za-z/!?])")


def as_written(text: str) -> str:
    """Return Markdown in which no tag is left.

    >>> as_written("a < b, <box>1</box>").replace(JOINER, "~")
    'a < b, <~box>1<~/box>'
    """
    return TAG.sub(f"<{JOINER}", text)


def given_back(text: str) -> str:
    """Return what was written, from text that `as_written` showed and a visitor edited."""
    return text.replace(f"<{JOINER}", "<")
