"""Which exceptions mean that the user, not the code, made the mistake?"""


class UserError(ValueError):
    """A mistake in the user's input, told in one sentence: what, where, how to mend it.

    The command line prints the sentence and exits with code 2; every other exception is a bug of
    ours and keeps its traceback.

    Attributes:
        code: what a screen in other languages finds its own sentence by, None where it has none.
        facts: what that sentence names.
    """

    def __init__(self, sentence: str, code: str | None = None, **facts: object) -> None:
        super().__init__(sentence)
        self.code, self.facts = code, facts
