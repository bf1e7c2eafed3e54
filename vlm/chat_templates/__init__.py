"""Which chat templates are there, and what does each need of the tokenizer?

Each is a Jinja file beside this one. `{% generation %}` marks what a model is trained to say: the
assistant's content and its end-of-turn. Images at the start of a turn each end in a newline.
"""

from dataclasses import dataclass
from pathlib import Path

from connectors.registry import lookup


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What a template needs: tokens of its own, and the token that ends an assistant's turn."""

    special_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None  # None: the tokenizer's eos token


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "chatml": ChatTemplate(special_tokens=("<|im_start|>", "<|im_end|>"), end_of_turn="<|im_end|>"),
    "llama3": ChatTemplate(
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "llava_plain": ChatTemplate(),
    "vicuna_v1": ChatTemplate(),
}


def load(name: str) -> str:
    """Return the Jinja text of a chat template.

    Raises:
        UserError: unknown name; the message lists the valid ones.
    """
    lookup("chat template", name, CHAT_TEMPLATES)
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
