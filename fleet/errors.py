"""The errors that a user sees: a usage that is refused, and a run that ends before its last step."""


class UsageError(ValueError):
    """Something the user asked for cannot be; the message says what was got, what was wanted and the remedy."""


class AgreedUsageError(UsageError):
    """One that every process raises, so that one of them says it."""


class RunEnded(Exception):
    """A run that had begun ends before its last step; the message says why, what is kept, and how to go on.

    is_of_all: every process raises it, so that one of them says it. can_resume: what is kept is worth going on from.
    """

    exit_code = 1
    label = "error"

    def __init__(self, message: str, *, is_of_all: bool = True, can_resume: bool = True):
        super().__init__(message)
        self.is_of_all, self.can_resume = is_of_all, can_resume


class RunStopped(RunEnded):
    """A run that cannot go on."""


class ProcessStopped(RunStopped):
    """One process that cannot go on, and says so itself; its launcher ends the others."""

    def __init__(self, message: str):
        # the worker of a data loader hands it on as text, behind a traceback
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.{type(self).__name__}: "), is_of_all=False)


class RunRefused(RunEnded):
    """A run that cannot be as it was asked for, which its first generation shows; nothing was trained."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(message, can_resume=False)


class Preempted(RunEnded):
    """A run that was told to stop, and has saved and stopped."""

    # sysexits.h: a temporary failure, try again. Job scripts may requeue on it.
    exit_code = 75
    label = "stopped"
