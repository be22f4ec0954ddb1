"""Draws that are the same on every machine and in every version of Python."""

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def sample_distinct(population: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    """`count` different items in random order, from `rng.random()` alone, whose stream Python guarantees to keep."""
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen.setdefault(int(rng.random() * len(population)))
    return [population[position] for position in chosen]
