"""The exceptions that the command line knows how to end on."""


class UsageError(ValueError):
    """Bad input. The message names the field, its value, what is allowed, and the remedy.

    The command line prints it as one line and exits with 2; `--debug` shows the traceback.
    """


class AgreedError(UsageError):
    """A UsageError that every process of the run raises at the same point, so that all can end in order."""


class TransientError(Exception):
    """Storage or network still failed after it was tried again for a while. The command line exits with 75: try again.

    Nothing is wrong with the input, and nothing is lost; schedulers start the same command again.
    """


class AgreedTransient(TransientError):
    """A TransientError that every process of the run raises at the same point, so that all can end in order."""


class Stopped(Exception):
    """The work in hand is given up, as the job was told to stop; `Job.shards` ends after it."""


class BrokenRun(Exception):
    """This process of several ends alone: it must not wait for the others, nor they for it.

    `code` is the exit code: 75 (try again) if another process went away first, 2 for bad input, 1 for anything else.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
