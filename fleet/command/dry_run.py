"""The answer of a dry run as one JSON object, also where a check refuses the run before it is planned."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fleet.errors import AgreedUsageError, UsageError


class DryRunProblems(AgreedUsageError):
    """A dry run found problems, and has shown them all."""


def print_answer(problems: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Prints the object on stdout, in a line: `fits`, `problems` and the figures."""
    print(json.dumps({"fits": not problems, "problems": list(problems), **figures}), flush=True)


@contextlib.contextmanager
def answered(*, is_wanted: bool) -> Iterator[None]:
    """Within it, a UsageError is printed as the answer too, if that is wanted and was not given."""
    try:
        yield
    except UsageError as error:
        if is_wanted and not isinstance(error, DryRunProblems):
            print_answer([str(error)], {})
        raise
