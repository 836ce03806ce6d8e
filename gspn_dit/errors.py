"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """Bad input: the message names the argument, the value that came, and what to do about it.

    Commands print it as one line and exit with status 2; in a library call it is an ordinary ValueError.
    """
