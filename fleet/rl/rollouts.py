"""A batch of rollouts: the record of each one, its form in rollouts.jsonl, and the metrics of all of them together.

Pure Python on plain values, so that every figure Fleet logs can be checked by hand. Knows no tensor and no trainer.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Self

from environment import Episode, Judgement, Message, Outcome
from fleet.run_folder import finite
from utils.tool_calls import ParseStatus


@dataclass(frozen=True)
class EpisodeRecord:
    """An episode as its group saw it. images: N file names, equal for equal pixels; labels: N words."""

    instruction: str
    target: str | None
    correct_index: int
    labels: tuple[str, ...]
    images: tuple[str, ...]

    @property
    def num_candidates(self) -> int:
        """N; the line of an older run may lack labels."""
        return max(len(self.labels), len(self.images))


@dataclass(frozen=True)
class RolloutRecord:
    """One completion with its verdict, made when it is rewarded; every consumer reads this record.

    reward: NaN where it was dropped. advantage: over the siblings' mean, after any KL term; NaN until that is known.
    """

    episode: EpisodeRecord
    completion: str
    verdict: Judgement
    reward: float
    advantage: float = math.nan


@dataclass(frozen=True)
class GroupRecord:
    """One episode and its G rollouts, a line of rollouts.jsonl. number: of the group in its step, from 0."""

    step: int
    number: int
    episode: EpisodeRecord
    rollouts: tuple[RolloutRecord, ...]

    def as_json(self) -> dict[str, Any]:
        """The line: what was shown and asked, and every completion. JSON has no NaN, so it becomes null."""
        return {
            "step": self.step,
            "group": self.number,
            **asdict(self.episode),
            "rollouts": [
                {
                    "completion": rollout.completion,
                    **asdict(rollout.verdict),
                    "reward": finite(rollout.reward),
                    "advantage": finite(rollout.advantage),
                }
                for rollout in self.rollouts
            ],
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        """The group of a line. Raises KeyError, TypeError or ValueError for another form."""
        step, number, target = int(line["step"]), int(line["group"]), line["target"]
        episode = EpisodeRecord(
            instruction=str(line["instruction"]),
            target=None if target is None else str(target),
            correct_index=int(line["correct_index"]),
            labels=tuple(map(str, line["labels"])),
            images=tuple(map(str, line["images"])),
        )
        rollouts = tuple(_rollout_from_json(episode, rollout) for rollout in line["rollouts"])
        picked = [rollout.verdict.index for rollout in rollouts if rollout.verdict.is_valid_call]
        if any(index not in range(episode.num_candidates) for index in (episode.correct_index, *picked)):
            raise ValueError("an index is that of no picture")
        return cls(step, number, episode, rollouts)


def _rollout_from_json(episode: EpisodeRecord, line: dict[str, Any]) -> RolloutRecord:
    index, outcome, status = line["index"], Outcome(line["outcome"]), ParseStatus(line["parse_status"])
    verdict = Judgement(outcome, status, None if index is None else int(index))
    reward, advantage = (math.nan if line[name] is None else float(line[name]) for name in ("reward", "advantage"))
    return RolloutRecord(episode, str(line["completion"]), verdict, reward, advantage)


def make_records(
    episodes: Sequence[Episode],
    image_digests: Sequence[bytes],
    completions: Sequence[str],
    verdicts: Sequence[Judgement],
    rewards: Sequence[float],
) -> list[RolloutRecord]:
    """The records of P groups of completions, group after group.

    image_digests: of all the episodes' pictures, in order. completions, verdicts and rewards: B, one a rollout.
    """
    names = (f"{digest.hex()[:16]}.webp" for digest in image_digests)
    seen_B: list[EpisodeRecord] = []
    for episode in episodes:
        instruction, images = instruction_of(episode.messages), tuple(islice(names, episode.num_candidates))
        seen = EpisodeRecord(instruction, episode.target, episode.correct_index, episode.labels, images)
        seen_B += [seen] * (len(completions) // len(episodes))
    return [RolloutRecord(*fields) for fields in zip(seen_B, completions, verdicts, rewards, strict=True)]


def instruction_of(messages: Sequence[Message]) -> str:
    """The last text of the user's messages, which asks for a picture."""
    texts = [
        part["text"]
        for message in messages
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text"
    ]
    return texts[-1] if texts else ""


def length_metrics(lengths: Sequence[int], is_ended: Sequence[bool]) -> dict[str, float]:
    """TRL's metrics of completion lengths in tokens: of all, of those that ended, and the share that did not end."""
    ended = [length for length, has_end in zip(lengths, is_ended, strict=True) if has_end] or [0]
    metrics = {"completions/clipped_ratio": 1 - sum(is_ended) / len(is_ended)}
    for name, values in (("length", lengths), ("terminated_length", ended)):
        metrics |= {
            f"completions/mean_{name}": sum(values) / len(values),
            f"completions/min_{name}": float(min(values)),
            f"completions/max_{name}": float(max(values)),
        }
    return metrics


def rollout_metrics(rollouts: Sequence[RolloutRecord], group_size: int) -> dict[str, float]:
    """The task metrics of P groups of `group_size` rollouts, group after group. Every value is a share in [0, 1].

    `accuracy`; `valid_call`; `outcome/<outcome>` and `parse/<status>`, each family summing to 1; `groups/all_right`,
    `groups/all_wrong`, `groups/mixed`, also summing to 1, from the verdicts alone: only mixed groups teach
    which index is right; `chosen_index/<i>`, the share of all rollouts that picked i, and
    `correct_index/<i>`, the share for which i was right, for every index in range.
    Raises ValueError unless the rollouts fill one or more whole groups.
    """
    if not rollouts or len(rollouts) % group_size:
        raise ValueError(f"{len(rollouts)} rollouts, but wanted one or more whole groups of {group_size}")
    verdicts = [rollout.verdict for rollout in rollouts]
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    statuses = Counter(verdict.parse_status for verdict in verdicts)
    chosen = Counter(verdict.index for verdict in verdicts)
    correct = Counter(rollout.episode.correct_index for rollout in rollouts)
    num_candidates = max(rollout.episode.num_candidates for rollout in rollouts)
    rights = [verdict.is_right for verdict in verdicts]
    rights_per_group = [sum(rights[start : start + group_size]) for start in range(0, len(rights), group_size)]
    num_groups, total = len(rights_per_group), len(rollouts)
    all_right, all_wrong = rights_per_group.count(group_size), rights_per_group.count(0)
    return {
        "accuracy": sum(rights) / total,
        "valid_call": sum(verdict.is_valid_call for verdict in verdicts) / total,
        **{f"outcome/{outcome}": outcomes[outcome] / total for outcome in Outcome},
        **{f"parse/{status}": statuses[status] / total for status in ParseStatus},
        "groups/all_right": all_right / num_groups,
        "groups/all_wrong": all_wrong / num_groups,
        "groups/mixed": (num_groups - all_right - all_wrong) / num_groups,
        **{f"chosen_index/{index}": chosen[index] / total for index in range(num_candidates)},
        **{f"correct_index/{index}": correct[index] / total for index in range(num_candidates)},
    }
