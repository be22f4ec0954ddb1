"""The processes of a run: one that has a problem stops them all, with the same words.

A process that raises by itself leaves the others waiting. Imports torch only where processes talk.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from fleet.errors import AgreedUsageError, UsageError

Result = TypeVar("Result")

# The form of accelerate.utils.gather_object: every process's list, joined in their order.
Gather = Callable[[list[Any]], list[Any]]


def is_alone() -> bool:
    """True for the only process of a run, by the launcher's variables."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def result_or_problem(check: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(result, None), or (None, the words of the UsageError) of a check. Raises it in a process started alone."""
    try:
        return check(), None
    except UsageError as error:
        if is_alone():
            raise
        return None, str(error)


def known_to_all(parse: Callable[[], Result]) -> Result:
    """The result of a check that comes before the process group. Raises its UsageError.

    Machines are started one by one, so what is wrong on one may be right on another, which would wait for it. Where
    there are several, the processes of this one join the others first and say it; those hear of it as they agree.
    """
    try:
        return parse()
    except UsageError as error:
        if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
            raise
        from accelerate import PartialState

        # joins, as the others do when they make their trainer's arguments
        PartialState()
        raise_first(gather_by_rank(str(error)))
        raise


def first_problem(problem: str | None, *checks: Callable[[], object]) -> str | None:
    """The problem if there is one, else the words of the first check that fails, as in `result_or_problem`."""
    for check in checks:
        problem = problem or result_or_problem(check)[1]
    return problem


def gather_by_rank(value: Any) -> list[Any]:
    """The value of every process, by rank. Every process takes part."""
    from accelerate.utils import gather_object

    return gather_object([value])


def most_of_ranks(accelerator: Any, count: int) -> int:
    """The maximum of every process's number. Every process takes part; its tensor is on the accelerator's device."""
    import torch

    return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())


def raise_first(
    problem_by_rank: Sequence[str | None], error_class: type[Exception] = AgreedUsageError, who: str | None = None
) -> None:
    """Raises the first problem. Every process passes the same list.

    who: the words before it, with {rank} in them; by default the process where there are several.
    """
    words = ("process {rank}: " if len(problem_by_rank) > 1 else "") if who is None else who
    for rank, problem in enumerate(problem_by_rank):
        if problem is not None:
            raise error_class(words.format(rank=rank) + problem)


def together(check: Callable[[], Result]) -> Result:
    """The result of a check that passes on every process. Raises UsageError on all if it fails on any."""
    result, problem = result_or_problem(check)
    raise_first(gather_by_rank(problem))
    return cast(Result, result)


def require_same_flags(flags: Mapping[str, Any]) -> None:
    """Raises UsageError on every process if any was started with other flags. flags: this process's, by name."""
    flags_by_rank = gather_by_rank(flags)
    values = {name: [other[name] for other in flags_by_rank] for name in sorted(flags)}
    differing = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    if differing:
        shown = ", ".join(f"{name}={sorted(set(map(str, found)))}" for name, found in differing.items())
        raise AgreedUsageError(f"processes were started with different flags: {shown}; give all the same")
