"""What is asked of a model: a reply, the likelihood of each letter, or both; and when?"""

from dataclasses import dataclass

from vlm.errors import UserError

STRATEGIES: dict[str, str] = {
    "reason": "letters scored after the reasoning the model wrote before its own letter",
    "direct": "letters scored right after the prompt",
}
SCORINGS = ("likelihood", "generation")


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What is asked of the model."""

    strategy: str = "reason"
    scorings: tuple[str, ...] = SCORINGS
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(
                f"unknown strategy {self.strategy!r}; choose from {', '.join(STRATEGIES)}"
            )
        unknown = [name for name in self.scorings if name not in SCORINGS]
        if unknown or not self.scorings:
            raise UserError(f"--score is {unknown}; choose from {', '.join(SCORINGS)}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    @property
    def generates(self) -> bool:
        """Whether a reply has to be written at all."""
        return "generation" in self.scorings or self.strategy == "reason"
