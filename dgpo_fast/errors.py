"""The one exception a user may see."""


class UserError(Exception):
    """Bad input or a bad environment: one line that names the thing and the remedy.

    Every command prints the message to stderr without a traceback and exits with status 2.
    """

    shared = False
    """Whether every process of a run raises this error: then the first one alone prints it."""
