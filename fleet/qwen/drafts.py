"""What a run's policy says most, as drafts for its next generation: a pure function of what it has said.

Built from the completions of all processes, so it is the same on each, and saved with the trainer's state, so that a
resumed run drafts what the uninterrupted one does. A draft never changes what is sampled. Imports no torch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Self

Drafts = list[list[list[int]]]  # of each group, token ids

MAX_DRAFT_TOKENS = 512  # behind one prompt: as many as a picture or two
MAX_COMPLETIONS = 32
MAX_TOKENS = 512  # of one completion
FORGETTING = 0.7  # what a generation leaves of the shares before it
MIN_SHARE = 0.02  # of the completions of late: rarer ones are not worth their place


class DraftMemory:
    """The most frequent completions of the latest generations, and how well drafts did in the last one."""

    def __init__(self) -> None:
        self.shares: dict[tuple[int, ...], float] = {}
        self.share_ended_in_first = 0.0  # of the last generation's rollouts: no pass but the first was made for them

    def add(self, ended: Sequence[Sequence[int]], num_completions: int, share_ended_in_first: float) -> None:
        """Takes in a generation: the token ids of those of its completions that ended, in any order."""
        counts = Counter(tuple(ids) for ids in ended if len(ids) <= MAX_TOKENS)
        shares = {ids: share * FORGETTING for ids, share in self.shares.items()}
        for ids, count in counts.items():
            # one that was said once is no habit yet
            if count > 1 or ids in shares:
                shares[ids] = shares.get(ids, 0.0) + (1 - FORGETTING) * count / num_completions
        best = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:MAX_COMPLETIONS]
        self.shares = {ids: share for ids, share in best if share >= MIN_SHARE * (1 - FORGETTING)}
        self.share_ended_in_first = share_ended_in_first

    def drafts(self) -> list[list[int]]:
        """The completions, the most frequent first."""
        return [list(ids) for ids in self.shares]

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes the same memory of."""
        completions = [[list(ids), share] for ids, share in self.shares.items()]
        return {"completions": completions, "share_ended_in_first": self.share_ended_in_first}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The memory that was saved. Raises KeyError, TypeError or ValueError for another form."""
        memory = cls()
        memory.shares = {tuple(int(token) for token in ids): float(share) for ids, share in saved["completions"]}
        memory.share_ended_in_first = float(saved["share_ended_in_first"])
        return memory


def within_budget(drafts: Iterable[Sequence[int]], max_nodes: int = MAX_DRAFT_TOKENS) -> list[list[int]]:
    """The drafts, in order, that fit into `max_nodes` tokens, equal beginnings counted once.

    >>> within_budget([[1, 2], [1, 3], [5, 6, 7], [1, 2, 4]], 4)
    [[1, 2], [1, 3], [1, 2, 4]]
    """
    beginnings: set[tuple[int, ...]] = set()
    chosen = []
    for ids in drafts:
        new = {tuple(ids[:end]) for end in range(1, len(ids) + 1)} - beginnings
        if len(beginnings) + len(new) <= max_nodes:
            beginnings |= new
            chosen.append(list(ids))
    return chosen
