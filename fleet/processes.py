"""The processes of a run: one that has a problem stops them all, with the same words.

A check that one process alone could fail goes through here, because a process that raises by itself leaves the others
waiting in their next collective. Imports torch only where processes talk.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fleet.errors import AgreedUsageError, UsageError

Result = TypeVar("Result")

# The form of accelerate.utils.gather_object: every process's list, joined in their order.
Gather = Callable[[list[Any]], list[Any]]


def is_alone() -> bool:
    """True for the only process of a run, by the launcher's variables."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def result_or_problem(check: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(the result of the check, None), or (None, the words of its UsageError) for `raise_together` to raise.

    A process that was started alone raises UsageError itself.
    """
    try:
        return check(), None
    except UsageError as error:
        if is_alone():
            raise
        return None, str(error)


def gather_by_rank(value: Any) -> list[Any]:
    """The value of every process, by rank. Every process takes part."""
    from accelerate.utils import gather_object

    return gather_object([value])


def raise_together(problem: str | None, error_class: type[Exception] = AgreedUsageError) -> None:
    """Raises the problem of the first process that has one, on every process. All take part, with None or a problem."""
    raise_first(gather_by_rank(problem), error_class)


def raise_first(
    problem_by_rank: Sequence[str | None], error_class: type[Exception] = AgreedUsageError, who: str | None = None
) -> None:
    """Raises the first problem, as every process does that has the same list of them.

    who: the words before it, with {rank} in them; by default the process, where there are several.
    """
    words = ("process {rank}: " if len(problem_by_rank) > 1 else "") if who is None else who
    for rank, problem in enumerate(problem_by_rank):
        if problem is not None:
            raise error_class(words.format(rank=rank) + problem)


def together(check: Callable[[], Result]) -> Result:
    """The result of the check, once it has passed on every process. Raises UsageError on all if it failed on any."""
    found: list[Result] = []
    _, problem = result_or_problem(lambda: found.append(check()))
    raise_together(problem)
    return found[0]


def require_same_flags(flags: dict[str, Any]) -> None:
    """Raises UsageError on every process if any was started with other flags. flags: this process's, by name."""
    flags_by_rank = gather_by_rank(flags)
    differing = [
        f"{name}={sorted({str(flags[name]) for flags in flags_by_rank})}"
        for name in sorted(flags)
        if any(other[name] != flags_by_rank[0][name] for other in flags_by_rank)
    ]
    if differing:
        raise AgreedUsageError(
            f"processes were started with different flags: {', '.join(differing)}; give all the same"
        )
