"""The errors that a user sees: a usage that is refused, and a run that ends before its last step."""

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """The user asked for something invalid; the message says what was got, what was wanted and the remedy."""


class AgreedUsageError(UsageError):
    """A UsageError that every process raises, so that one of them says it."""


def one_line(error: BaseException) -> str:
    """The words of an error in one line."""
    return " ".join(str(error).split())


def reason_of(error: Exception) -> str:
    """The words of an error, without the path that an OSError names."""
    return str(getattr(error, "strerror", None) or error)


@contextlib.contextmanager
def refused(*kinds: type[Exception], before: str = "", after: str = "") -> Iterator[None]:
    """Within it, an error of these kinds becomes a UsageError. before, after: put around the error's own words."""
    try:
        yield
    except kinds as error:
        raise UsageError(f"{before}{error}{after}") from error


class RunEnded(Exception):
    """A run ends before its last step; the message says why, what is kept, and how to go on.

    is_of_all: every process raises it, so that one of them says it. can_resume: the run can go on from what is kept.
    """

    exit_code = 1
    label = "error"

    def __init__(self, message: str, *, is_of_all: bool = True, can_resume: bool = True):
        super().__init__(message)
        self.is_of_all, self.can_resume = is_of_all, can_resume


class RunStopped(RunEnded):
    """The run failed."""


class ProcessStopped(RunStopped):
    """One process failed, and says so itself; its launcher ends the others."""

    def __init__(self, message: str):
        # the worker of a data loader hands it on as text, behind a traceback
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.{type(self).__name__}: "), is_of_all=False)


class RunRefused(RunEnded):
    """The first generation shows that the flags do not fit together; nothing was trained."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(message, can_resume=False)


class Preempted(RunEnded):
    """The run was told to stop, and has saved."""

    # sysexits.h: a temporary failure, try again. Job scripts may requeue on it.
    exit_code = 75
    label = "stopped"
