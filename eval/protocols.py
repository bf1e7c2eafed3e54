"""How is a question put to the model? Named wordings around a data set's own prompt.

A score without its wording cannot be reproduced: the same model moves by twenty points between
wordings. The chosen wording is written out in every results file.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The text before and after a data set's prompt, and the parser of the harness it follows.

    `foreign_parser` names an entry of `eval.foreign_answers.FOREIGN_PARSERS`; its score is
    reported beside ours, under that name, so that published numbers can be met.
    """

    name: str
    summary: str
    prefix: str = ""
    suffix: str = ""
    foreign_parser: str | None = None

    def wrap(self, prompt: str) -> str:
        """Return the text sent to the model."""
        return f"{self.prefix}{prompt}{self.suffix}"


OFFICIAL = Protocol(name="official", summary="the data set's prompt, word for word")
CAMBRIAN = Protocol(
    name="cambrian",
    summary="Cambrian-1's suffix: answer with the letter directly",
    suffix="\nAnswer with the option's letter from the given choices directly.",
    foreign_parser="cambrian",
)
LMMS = Protocol(
    name="lmms",
    summary="lmms-eval's note before the prompt: respond with the letter alone",
    prefix=(
        "Note: You only need to respond with A, B, C without providing any additional "
        "information.\n\n"
    ),
    foreign_parser="lmms",
)

PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (OFFICIAL, CAMBRIAN, LMMS)}
