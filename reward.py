"""Rewards: a verdict becomes one finite number.

Owns the weights of a verdict's components. The environment decides what is right, and which components there are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from environment import Judgement, judge
from fleet.verdicts import CORRECT, VALID_CALL, Verdict


@dataclass(frozen=True)
class RewardWeights:
    """The worth of each component. By default a right answer is worth exactly 1 and an unparsable one 0.

    correct: > 0, of the component of right answers. valid_call: >= 0, of that of any well-formed call whose arguments
    are in range; small, so that form never rivals the answer. Every other component, which an environment names itself,
    counts as it is. Raises ValueError for other or non-finite numbers.
    """

    correct: float = 0.95
    valid_call: float = 0.05

    def __post_init__(self) -> None:
        if not (math.isfinite(self.correct) and self.correct > 0):
            raise ValueError(f"correct weight {self.correct}, but it must be finite and above 0; pass 0.95")
        if not (math.isfinite(self.valid_call) and self.valid_call >= 0):
            raise ValueError(f"valid_call weight {self.valid_call}, but it must be finite and at least 0; pass 0.05")
        if not self.valid_call < self.correct + self.valid_call < math.inf:
            raise ValueError(
                f"weights {self.correct} and {self.valid_call}: right must be worth finitely more than wrong; "
                "pass 0.95 and 0.05"
            )

    def of(self, component: str) -> float:
        """The weight of a component."""
        return {CORRECT: self.correct, VALID_CALL: self.valid_call}.get(component, 1.0)


DEFAULT_WEIGHTS = RewardWeights()


def reward_of(verdict: Verdict | Judgement, weights: RewardWeights = DEFAULT_WEIGHTS) -> float:
    """The reward of one verdict: the weighted sum of its components. Of a task that picks an image, by default:

    | outcome             | correct | valid_call | reward by default |
    |---------------------|---------|------------|-------------------|
    | correct             | 1       | 1          | 1.00              |
    | wrong_index         | 0       | 1          | 0.05              |
    | index_out_of_range  | 0       | 0          | 0.00              |
    | unparsable          | 0       | 0          | 0.00              |
    """
    return math.fsum(weights.of(name) * value for name, value in verdict.components.items())


def compute_rewards_from_generations(
    generations: Sequence[str],
    correct_indices: Sequence[int],
    num_candidates: int | Sequence[int],
    weights: RewardWeights = DEFAULT_WEIGHTS,
    *,
    allow_reasoning: bool = False,
) -> list[float]:
    """One finite reward per generation, in order; right > wrong but valid > unparsable.

    generations: B completions without their end-of-turn tokens. correct_indices: B ints. num_candidates: one int for
    all, or B. Raises ValueError if the lengths differ.

    >>> from utils.tool_calls import make_tool_call_str
    >>> right = make_tool_call_str(0)
    >>> compute_rewards_from_generations([right, right, "image 0"], [0, 1, 0], 4)
    [1.0, 0.05, 0.0]
    """
    if isinstance(num_candidates, int):
        num_candidates = [num_candidates] * len(generations)
    if not len(generations) == len(correct_indices) == len(num_candidates):
        raise ValueError(
            f"{len(generations)} generations, {len(correct_indices)} correct_indices and {len(num_candidates)} "
            "num_candidates, but each generation needs one of each"
        )
    return [
        reward_of(judge(completion, correct_index, count, allow_reasoning=allow_reasoning), weights)
        for completion, correct_index, count in zip(generations, correct_indices, num_candidates, strict=True)
    ]


def make_trl_reward_function(
    weights: RewardWeights = DEFAULT_WEIGHTS, *, allow_reasoning: bool = False
) -> Callable[..., list[float]]:
    """`compute_rewards_from_generations` in the form TRL calls: by columns of the data set, one value a completion.

    The function takes `completions` as texts or as TRL's conversational form, and the columns `correct_index` and
    `num_candidates` of RepeatableEpisodeDataset; TRL passes more keywords, which it does not use.
    """

    def verdict_reward(
        completions: Sequence[str] | Sequence[list[dict[str, str]]],
        correct_index: Sequence[int],
        num_candidates: Sequence[int],
        **_unused_columns: object,
    ) -> list[float]:
        generations = [done if isinstance(done, str) else done[-1]["content"] for done in completions]
        return compute_rewards_from_generations(
            generations, correct_index, num_candidates, weights, allow_reasoning=allow_reasoning
        )

    return verdict_reward
