"""How do the page's labels follow the browser's language? All of them are set when it opens."""

from collections.abc import Mapping
from typing import Any, TypeVar

import gradio as gr
from gradio.blocks import Block

from demo.told import language
from demo.wording import say

C = TypeVar("C", bound=Block)


class Labels:
    """Which words of demo.wording stand in which property of which component."""

    def __init__(self) -> None:
        self._keys: list[tuple[Block, Mapping[str, str]]] = []

    def new(self, kind: type[C], keys: Mapping[str, str], *args: Any, **fields: Any) -> C:
        """Make a component.

        Args:
            kind: its class.
            keys: property -> key of demo.wording, such as {"label": "top_p"}.
            args: the component's other arguments.
            fields: the component's other named arguments.
        """
        words = {name: say("en", key) for name, key in keys.items()}
        component = kind(*args, **words, **fields)
        self._keys.append((component, keys))
        return component

    @property
    def components(self) -> list[Block]:
        """What `in_language` updates, in its order."""
        return [component for component, _ in self._keys]

    def in_language(self, request: gr.Request) -> list[dict[str, Any]]:
        """Return an update of every component: its words in the browser's language."""
        wanted = language(request)
        words: list[dict[str, Any]] = [
            {name: say(wanted, key) for name, key in keys.items()} for _, keys in self._keys
        ]
        return [gr.update(**properties) for properties in words]
