"""A model that looks, while it trains: the points of a curve on fixed held-out episodes, and the rule for blind gains.

Owns the figures of a point and the statistics of the rule. rl/look_watch.py decides when a point is taken and what
follows. Plain Python on answers that are judged already.

A policy that looks is right on true pictures, near chance on grey ones, and follows a picture that is swapped with
another. A policy that does not look answers all three alike: as often right on grey pictures as on true ones, and it
follows no swap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fleet.controls import Control
from fleet.episodes import Episode
from fleet.evaluation.figures import Evaluation

LOOK_CONTROLS = (Control.BLANK_IMAGES, Control.SWAPPED_IMAGES)
MAX_FALSE_ALARM = 0.05  # of a whole run, shared out among its points
MIN_P_OF_NO_GROWTH = 0.05  # of the gap between true and grey pictures, above which it has not grown
NUM_IN_A_ROW = 2  # points that must agree

Hits = tuple[bool | None, ...]
LETTERS = {True: "1", False: "0", None: "-"}


@dataclass(frozen=True)
class LookPoint:
    """What was hit on the same M episodes at one step; None where an episode could not be shown or has no such change.

    is_right: with the true pictures. is_right_grey: with every picture grey. follows: the choice went with its picture
    to another place.
    """

    step: int
    is_right: Hits
    is_right_grey: Hits
    follows: Hits

    @classmethod
    def of(cls, evaluation: Evaluation, episodes: Sequence[Episode], step: int) -> "LookPoint":
        """The point on these episodes, which an evaluation has answered but for those that it left out."""
        place_of = {id(episode): place for place, episode in enumerate(evaluation.episodes)}
        places = [place_of.get(id(episode)) for episode in episodes]

        def at(hits: Sequence[bool | None]) -> Hits:
            return tuple(None if place is None else hits[place] for place in places)

        grey, swapped = (evaluation.hits[control] for control in LOOK_CONTROLS)
        return cls(step, at(evaluation.is_right), at(grey), at(swapped))

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "LookPoint":
        """The point that `as_json` gave."""
        values = {letter: value for value, letter in LETTERS.items()}
        true, grey, swapped = (tuple(values[letter] for letter in kept[name]) for name in ("true", "grey", "swapped"))
        return cls(kept["step"], true, grey, swapped)

    def as_json(self) -> dict[str, Any]:
        """The point with a letter an episode.

        >>> LookPoint(25, (True, False), (False, None), (True, None)).as_json()
        {'step': 25, 'true': '10', 'grey': '0-', 'swapped': '1-'}
        """
        named = {"true": self.is_right, "grey": self.is_right_grey, "swapped": self.follows}
        return {"step": self.step} | {name: "".join(map(LETTERS.__getitem__, hits)) for name, hits in named.items()}

    def figures(self) -> dict[str, float]:
        """The figures for metrics.jsonl and the trackers: shares, and the episodes that each counts."""
        named = {"true": self.is_right, "grey": self.is_right_grey, "swapped": self.follows}
        counted = {name: [hit for hit in hits if hit is not None] for name, hits in named.items()}
        shares = {f"control/{name}": sum(hits) / len(hits) for name, hits in counted.items() if hits}
        numbers = {"control/episodes": counted["true"], "control/swapped_episodes": counted["swapped"]}
        return shares | {name: float(len(hits)) for name, hits in numbers.items()}


def gains_blindly(start: LookPoint, now: LookPoint, *, level: float, num_points: int) -> bool:
    """True if accuracy has risen since the start, and rose as much with grey pictures.

    level: the share that chance, or always the same answer, gets right. num_points: of the run, its start not counted.
    All four must hold, on the episodes that both points have:

    1. More episodes are right than at the start (one-sided exact McNemar test, p <= 0.05 / num_points).
    2. More are right with grey pictures than at the start (the same test).
    3. More are right with grey pictures than `level` (exact binomial test, p <= 0.05 / num_points).
    4. The gap between true and grey pictures has not grown since the start (exact sign-flip test, p > 0.05).

    A policy that is not right oftener with grey pictures passes 2 or 3 by luck alone, so by the union bound a whole run
    has a false alarm in at most 1 of 20. As NUM_IN_A_ROW points must agree and all four must hold, it is far rarer: in
    tests/evaluation/test_looking.py, 0 of 20,000 simulated runs of each kind (32 episodes, 10 points; a policy that
    looks, one that guesses anew at each point, one with a lasting habit), so below 0.02 % at 95 % confidence. Where one
    answer is always right, `level` is 1 and nothing is above it. A policy that learns only to make valid calls rises to
    chance, not above it.
    """
    paired = [
        (before, after, grey_before, grey_after)
        for before, after, grey_before, grey_after in zip(
            start.is_right, now.is_right, start.is_right_grey, now.is_right_grey, strict=True
        )
        if None not in (before, after, grey_before, grey_after)
    ]
    rises, grey_rises, growths = [], [], []
    for before, after, grey_before, grey_after in paired:
        rises.append(int(bool(after)) - int(bool(before)))
        grey_rises.append(int(bool(grey_after)) - int(bool(grey_before)))
        growths.append(rises[-1] - grey_rises[-1])
    max_p = MAX_FALSE_ALARM / max(1, num_points)
    num_right_grey = sum(bool(grey_after) for *_, grey_after in paired)
    return (
        p_of_at_least(num_right_grey, len(paired), level) <= max_p
        and p_of_rise(rises) <= max_p
        and p_of_rise(grey_rises) <= max_p
        and p_of_rise(growths) > MIN_P_OF_NO_GROWTH
    )


@lru_cache(maxsize=4096)
def p_of_at_least(num_hits: int, n: int, share: float) -> float:
    """Probability of `num_hits` or more of n independent trials that hit with probability `share`.

    >>> p_of_at_least(2, 2, 0.25)
    0.0625
    """
    return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(num_hits, n + 1))


def p_of_rise(changes: Sequence[int]) -> float:
    """One-sided exact p-value that paired changes come as often up as down: their signs are fair coin tosses.

    changes: whole numbers; of 0 and 1 before and after, this is McNemar's test. The sum over all signs is exact.

    >>> p_of_rise([1, 1, 1, 0, -1])
    0.3125
    """
    ways = {0: 1}
    sizes = [abs(change) for change in changes if change]
    for size in sizes:
        further: dict[int, int] = {}
        for total, count in ways.items():
            for reached in (total + size, total - size):
                further[reached] = further.get(reached, 0) + count
        ways = further
    observed = sum(changes)
    # whole numbers until the end: 2**len(sizes) overflows a float beyond 1,023
    return sum(count for total, count in ways.items() if total >= observed) / 2 ** len(sizes)
