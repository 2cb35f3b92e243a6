"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the thing, says what is wrong with it and what would be right.
    The command line prints it and exits with code 2; nothing has been written by then.
    """
