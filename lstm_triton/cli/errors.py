"""The one exception that the command line reports as a line instead of a traceback."""


class UserError(Exception):
    """Something that the user gave (an option, a text, a checkpoint) cannot be used; the message says what and why."""
