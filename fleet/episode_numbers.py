"""The numbers of a run's episodes, in plain integers: its own, and those that stand in for others.

Episode `n` of a run is episode `n` of its environment. Where it cannot be shown, n + k * REPLACEMENT_STRIDE stands in;
where its group teaches nothing, n + t * FURTHER_STRIDE. No two of them meet, and none depends on the run's length.
"""

import itertools
from collections.abc import Iterator

# Replacements are drawn this far on: no run gets there, and a prime step leaves the period of a repeating environment.
REPLACEMENT_STRIDE = 1_000_000_007
MAX_REPLACEMENTS = 100
# beyond all replacements, and no multiple of a small number either
FURTHER_STRIDE = (MAX_REPLACEMENTS + 3) * REPLACEMENT_STRIDE


def further_number(number: int, attempt: int) -> int:
    """The episode that is drawn in place of episode `number` of a run at the attempt with this number, from 1.

    >>> further_number(7, 2) - further_number(7, 1) == FURTHER_STRIDE
    True
    """
    return number + attempt * FURTHER_STRIDE


def numbers_drawn(num_episodes: int, num_attempts: int = 0) -> Iterator[int]:
    """All numbers that a run may draw: its own, then those of each further attempt.

    >>> [number % FURTHER_STRIDE for number in numbers_drawn(2, 1)]
    [0, 1, 0, 1]
    """
    attempts = itertools.product(range(num_attempts + 1), range(num_episodes))
    return (further_number(number, attempt) for attempt, number in attempts)
