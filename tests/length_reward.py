"""A reward that any completion has, for tests of runs whose toy answers nothing right."""

from typing import Any


def score(completions: list[str], **columns: Any) -> list[float]:
    """By the completion's length alone."""
    return [len(completion) % 7 / 7 for completion in completions]
