"""The one exception that stands for bad input."""

DIVERGED = "the network's values are NaN or infinite; its training has diverged"  # of a ValueError


class InputError(ValueError):
    """What the user gave cannot be used. The message names the setting, its value and the remedy.

    The entry points print it as `error: <message>`, one line a problem, and exit with code 2. In Python it is
    an ordinary `ValueError`.

    Args:
        problems: one line each; several when several settings are wrong at once.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems
