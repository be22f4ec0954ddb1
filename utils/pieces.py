"""A sequence cut into pieces of given lengths."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def in_pieces(items: Sequence[Item], lengths: Iterable[int]) -> list[list[Item]]:
    """The items in order, in pieces of these lengths.

    >>> in_pieces("abcde", [2, 0, 3])
    [['a', 'b'], [], ['c', 'd', 'e']]
    """
    rest = iter(items)
    return [list(islice(rest, length)) for length in lengths]
