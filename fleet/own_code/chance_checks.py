"""The check of an environment's chance: how often the gold answer to another episode is right. And of repeats.

Owns the sample of episodes that this takes, and the test that two shares differ. Imports no torch.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from fleet.episodes import Episode
from fleet.known_answers import chance_of
from fleet.own_code.answer_checks import AnswerChecks
from fleet.own_code.environment_trial import comparable_fields
from fleet.own_code.findings import Kind, Ledger
from fleet.own_code.probes import is_taken
from utils.tool_calls import make_call_str

NUM_DISTINCT, LEAST_DISTINCT = 64, 48  # fewer are learnt by heart
NUM_PAIRS, LEAST_PAIRS, MAX_PAIRS_S = 256, 200, 30.0
LEAST_SAME = 16
IMPROBABLE = 1e-6


@dataclass
class Sample:
    """The share of gold answers that are right for another episode, and what the environment says of it.

    said: the mean of chance(), None where it says nothing. num_distinct: of the first 64 episodes, where all are there.
    """

    num_right: int = 0
    num_pairs: int = 0
    said: float | None = None
    num_distinct: int | None = None
    golds: set[str] = field(default_factory=set)

    @property
    def measured(self) -> float | None:
        """The share; None without a pair."""
        return self.num_right / self.num_pairs if self.num_pairs else None


def draw_sample(
    draw: Callable[[int], Episode | None], answers: AnswerChecks | None, ledger: Ledger, num_pairs: int
) -> Sample:
    """The sample, with findings about what is wrong with it.

    draw: an episode, or None where there is none. answers: None where no answer can be judged. Each episode is in one
    pair, and repeated ones are in none: pairs that share one would not be independent.
    """
    sample, began, seen = Sample(), time.monotonic(), set[str]()
    chances: list[float | None] = []
    for index in range(0, max(NUM_DISTINCT, 2 * num_pairs if answers is not None else 0), 2):
        pair = [episode for one in (index, index + 1) if (episode := draw(one)) is not None]
        if len(pair) < 2 or time.monotonic() - began > MAX_PAIRS_S:
            break
        num_before = len(seen)
        seen |= {_digest(episode) for episode in pair}
        if index + 2 == NUM_DISTINCT:
            sample.num_distinct = len(seen)
        if answers is None or len(seen) < num_before + 2:
            continue
        gold, own = (answers.gold(index + place, episode) for place, episode in enumerate(pair))
        if gold is None or own is None or not is_taken(gold, answers.tools):
            break
        if (verdict := answers.verdict(f"episode {index + 1}", pair[1], gold)) is None:
            break
        sample.num_pairs, sample.num_right = sample.num_pairs + 1, sample.num_right + verdict.is_right
        sample.golds |= {make_call_str(gold), make_call_str(own)}
        with ledger.catching(Kind.CHANCE, where=f"episode {index + 1}: "):
            chances.append(chance_of(answers.env, pair[1]))
    said = [chance for chance in chances if chance is not None]
    sample.said = sum(said) / len(said) if said and len(said) == sample.num_pairs else None
    _judge(sample, ledger, 0.0 if answers is None else answers.best_blind_share())
    return sample


def _judge(sample: Sample, ledger: Ledger, blind_share: float) -> None:
    """Findings about a sample. blind_share: of episodes in which one and the same call is right."""
    if sample.num_distinct is not None and sample.num_distinct < LEAST_DISTINCT:
        ledger.add(
            Kind.REPEATS,
            f"{sample.num_distinct} of the first {NUM_DISTINCT} episodes are distinct; a policy may learn them by "
            "heart: draw from more",
        )
    if len(sample.golds) == 1 and sample.num_pairs >= LEAST_SAME:
        ledger.add(
            Kind.SAME_ANSWER,
            f"the gold answer to all of {2 * sample.num_pairs} episodes is {_call_of(sample.golds)}, so a policy wins "
            "without looking; vary it, unless that is the point",
        )
    elif sample.said is not None and sample.num_pairs >= LEAST_PAIRS and not ledger.has(Kind.ALL_RIGHT):
        measured, num_wrong = sample.measured or 0.0, sample.num_pairs - sample.num_right
        words = (
            f"chance() says {sample.said:.1%} on average, but of {sample.num_pairs} gold answers to other episodes "
            f"{measured:.1%} are right"
        )
        if exceeds(sample.num_right, sample.num_pairs, sample.said):
            ledger.add(Kind.CHANCE_EXCEEDED, f"{words}; balance the answers, or say the chance that there is")
        # the chance may be meant as that of the best call, always said
        elif blind_share < sample.said / 2 and exceeds(num_wrong, sample.num_pairs, 1 - sample.said):
            ledger.add(Kind.CHANCE_MISSED, f"{words}; say a lower chance if guessing is no better")


def exceeds(num_right: int, num_pairs: int, chance: float) -> bool:
    """True if so many right ones of so many, each with this chance, have a probability below one in a million."""
    terms = (math.comb(num_pairs, count) * chance**count * (1 - chance) ** (num_pairs - count)
             for count in range(num_right, num_pairs + 1))  # fmt: skip
    return math.fsum(terms) < IMPROBABLE


def _call_of(texts: Collection[str]) -> str:
    """The JSON of the first call of these."""
    return next(iter(texts)).splitlines()[1]


def _digest(episode: Episode) -> str:
    fields = {name: entries for name, entries in comparable_fields(episode).items() if name != "seed"}
    return hashlib.sha256(json.dumps(fields, default=str, sort_keys=True).encode()).hexdigest()
