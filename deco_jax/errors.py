"""The one exception that means: the user can mend this."""


class UsageError(ValueError):
    """Bad input. The message names the field, its value, what is allowed, and the remedy.

    The command line prints it as one line and exits with 2; `--debug` shows the traceback.
    """
