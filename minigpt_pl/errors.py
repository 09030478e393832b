"""The exception for bad input."""

DIVERGED = "the network's values are NaN or infinite, so its training has diverged; choose another checkpoint"


class InputError(ValueError):
    """The user's input cannot be used. Each message names the setting, its value and the remedy.

    The commands print one line `error: <message>` per problem and exit with code 2.

    Args:
        problems: one argument per problem, each of one line.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class TextLostError(InputError):
    """A streamed text cannot be read any more. The training saves a checkpoint before it ends."""
