"""Which exceptions mean that the user, not the code, made the mistake?"""


class UserError(ValueError):
    """A mistake in the user's input, told in one sentence: what, where, how to mend it.

    The command line prints the sentence and exits with code 2; every other exception is a bug of
    ours and keeps its traceback.
    """
