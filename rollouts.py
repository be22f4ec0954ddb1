"""What a batch of rollouts amounts to: the record of each one, and the metrics of all of them together.

Pure Python on plain values, so that every figure Fleet logs can be checked by hand. Knows no tensor and no trainer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from environment import Judgement, Outcome
from utils.tool_calls import ParseStatus


@dataclass(frozen=True)
class RolloutRecord:
    """One completion and what became of it. `advantage` is over its siblings' mean, after any KL term."""

    target: str | None
    correct_index: int
    num_candidates: int
    completion: str
    judgement: Judgement
    reward: float
    advantage: float


def rollout_metrics(rollouts: Sequence[RolloutRecord], group_size: int) -> dict[str, float]:
    """The task metrics of P groups of `group_size` rollouts, group after group. Every value is a share in [0, 1].

    `accuracy`; `valid_call`; `outcome/<outcome>` and `parse/<status>`, each family summing to 1; `groups/all_right`,
    `groups/all_wrong`, `groups/mixed`, also summing to 1, from the task's verdicts alone: only mixed groups teach
    which index is right; `chosen_index/<i>`, the share of all rollouts that picked i, for every index in range.
    Raises ValueError if the rollouts are none or do not fill whole groups.
    """
    if not rollouts or len(rollouts) % group_size:
        raise ValueError(f"{len(rollouts)} rollouts, but wanted one or more whole groups of {group_size}")
    verdicts = [rollout.judgement for rollout in rollouts]
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    statuses = Counter(verdict.parse_status for verdict in verdicts)
    chosen = Counter(verdict.index for verdict in verdicts)
    rights = [verdict.outcome is Outcome.CORRECT for verdict in verdicts]
    rights_per_group = [sum(rights[start : start + group_size]) for start in range(0, len(rights), group_size)]
    num_groups, total = len(rights_per_group), len(rollouts)
    all_right, all_wrong = rights_per_group.count(group_size), rights_per_group.count(0)
    return {
        "accuracy": outcomes[Outcome.CORRECT] / total,
        "valid_call": (outcomes[Outcome.CORRECT] + outcomes[Outcome.WRONG_INDEX]) / total,
        **{f"outcome/{outcome}": outcomes[outcome] / total for outcome in Outcome},
        **{f"parse/{status}": statuses[status] / total for status in ParseStatus},
        "groups/all_right": all_right / num_groups,
        "groups/all_wrong": all_wrong / num_groups,
        "groups/mixed": (num_groups - all_right - all_wrong) / num_groups,
        **{
            f"chosen_index/{index}": chosen[index] / total
            for index in range(max(rollout.num_candidates for rollout in rollouts))
        },
    }
