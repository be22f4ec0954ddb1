"""A batch of rollouts: the record of each one, its form in rollouts.jsonl, and the metrics of all of them together.

Pure Python on plain values, so that every figure Fleet logs can be checked by hand. Knows no tensor and no trainer.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Self

from environment import Episode, EpisodeSource, Message
from fleet.episodes import BrokenEpisode
from fleet.known_answers import choices_of, solutions_of
from fleet.run_folder import finite
from fleet.verdicts import CORRECT, VALID_CALL, Verdict
from utils.images import name_of_picture
from utils.pieces import in_pieces
from utils.tool_calls import ParseStatus, ToolCall


@dataclass(frozen=True)
class EpisodeRecord:
    """An episode as its group saw it.

    images: N file names, equal for equal pixels. labels: N words, or none. correct_index: of a task that picks an
    image. solution: the gold answer in words, which is one of `choices` where an answer is one of a few. episode_index:
    its number in the data set, which names the draws of its rollouts; None in the records of an older Fleet.
    """

    instruction: str
    target: str | None
    correct_index: int | None
    labels: tuple[str, ...]
    images: tuple[str, ...]
    choices: tuple[str, ...] = ()
    solution: str = ""
    episode_index: int | None = None


@dataclass(frozen=True)
class TurnRecord:
    """One turn of a rollout, and what a tool answered behind it: text and file names, or None where none did."""

    completion: str
    num_tokens: int  # sampled
    observation: str | None = None
    images: tuple[str, ...] = ()

    @property
    def answer(self) -> str | None:
        """What a tool answered, in brackets for a reader; None where none did."""
        if self.observation is None:
            return None
        count = len(self.images)
        shown = f", {count} picture{'s' * (count > 1)}" if count else ""
        return f"[tool: {self.observation}{shown}]"


@dataclass(frozen=True)
class RolloutRecord:
    """One completion with its verdict, made when it is rewarded; every consumer reads this record.

    completion: what was sampled, turn by turn, each in a line of its own. turns: where there may be several, else ().
    reward: NaN where it was dropped. advantage: over the siblings' mean, after any KL term; NaN until that is known.
    token_ids: as sampled. logps: of each token under the distribution that it was drawn from; () where unknown.
    """

    episode: EpisodeRecord
    completion: str
    verdict: Verdict
    reward: float
    advantage: float = math.nan
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    turns: tuple[TurnRecord, ...] = ()

    @property
    def turn_ids(self) -> list[list[int]]:
        """The token ids of each turn."""
        lengths = [turn.num_tokens for turn in self.turns] or [len(self.token_ids)]
        return in_pieces(self.token_ids, lengths)

    @property
    def images(self) -> tuple[str, ...]:
        """The names of all pictures that the model was shown: the episode's, then those of tools."""
        return (*self.episode.images, *(name for turn in self.turns for name in turn.images))

    @property
    def conversation(self) -> str:
        """The turns in one text, and between them in brackets what a tool answered; the completion, if there is one."""
        pieces = [piece for turn in self.turns for piece in (turn.completion, turn.answer) if piece is not None]
        return " ".join(pieces) if self.turns else self.completion

    @property
    def chosen(self) -> str | None:
        """The choice that was made; None if there are no choices, or the answer is none of them."""
        return name if self.verdict.call and (name := str(self.verdict.call)) in self.episode.choices else None


def picture_chosen(rollout: RolloutRecord) -> int | None:
    """The place of the picture that a rollout picked; None where the task picks none, or the rollout did not."""
    if rollout.episode.correct_index is None or rollout.chosen is None:
        return None
    return rollout.episode.choices.index(rollout.chosen)


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
                    "token_ids": list(rollout.token_ids),
                    "logps": [finite(round(logp, 6)) for logp in rollout.logps],
                    **({"turns": [asdict(turn) for turn in rollout.turns]} if rollout.turns else {}),
                }
                for rollout in self.rollouts
            ],
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        """The group of a line. Raises KeyError, TypeError or ValueError for another form."""
        step, number, target, index = int(line["step"]), int(line["group"]), line["target"], line["correct_index"]
        labels, images = tuple(map(str, line["labels"])), tuple(map(str, line["images"]))
        if index is not None and int(index) not in range(max(len(labels), len(images))):
            raise ValueError("correct_index is that of no picture")
        episode = EpisodeRecord(
            instruction=str(line["instruction"]),
            target=None if target is None else str(target),
            correct_index=None if index is None else int(index),
            labels=labels,
            images=images,
            # a run of an older Fleet picked an image
            choices=tuple(map(str, line.get("choices", range(max(len(labels), len(images)))))),
            solution=str(line.get("solution", index)),
            episode_index=line.get("episode_index"),
        )
        return cls(step, number, episode, tuple(_rollout_from_json(episode, rollout) for rollout in line["rollouts"]))


def _rollout_from_json(episode: EpisodeRecord, line: dict[str, Any]) -> RolloutRecord:
    status, outcome = ParseStatus(line["parse_status"]), str(line["outcome"])
    if "is_right" in line:
        call = None if line["call"] is None else ToolCall(str(line["call"]["name"]), dict(line["call"]["arguments"]))
        components = {str(name): float(value) for name, value in line["components"].items()}
        verdict = Verdict(outcome, bool(line["is_right"]), components, status, call)
    else:
        call = None if line["index"] is None else ToolCall("", {"index": int(line["index"])})
        is_right = outcome == "correct"
        components = {CORRECT: float(is_right), VALID_CALL: float(is_right or outcome == "wrong_index")}
        verdict = Verdict(outcome, is_right, components, status, call)
    reward, advantage = (math.nan if line[name] is None else float(line[name]) for name in ("reward", "advantage"))
    # a run of an older Fleet has no token ids
    token_ids = tuple(map(int, line.get("token_ids", ())))
    logps = tuple(math.nan if logp is None else float(logp) for logp in line.get("logps", ()))
    if logps and len(logps) != len(token_ids):
        raise ValueError(f"a rollout has {len(token_ids)} tokens and {len(logps)} log-probabilities")
    turns = tuple(TurnRecord(**turn | {"images": tuple(turn["images"])}) for turn in line.get("turns", ()))
    return RolloutRecord(episode, str(line["completion"]), verdict, reward, advantage, token_ids, logps, turns)


def episode_records(
    env: EpisodeSource,
    episodes: Sequence[Episode],
    image_digests: Sequence[bytes],
    numbers: Sequence[int] | None = None,
    max_turns: int = 1,
) -> tuple[list[EpisodeRecord], str | None]:
    """(the record of each of P episodes, None); with the reason why the environment is broken, the records before it.

    image_digests: of all the episodes' pictures, in order. numbers: of the episodes in the data set. An
    environment is broken that has no sound choices or solution for an episode; the solution of several turns is the
    last one's.
    """
    names = map(name_of_picture, image_digests)
    seen: list[EpisodeRecord] = []
    try:
        known: Sequence[int | None] = [None] * len(episodes) if numbers is None else numbers
        for episode, number in zip(episodes, known, strict=True):
            seen.append(
                EpisodeRecord(
                    instruction_of(episode.messages),
                    episode.target,
                    episode.correct_index,
                    episode.labels,
                    tuple(islice(names, episode.num_candidates)),
                    choices_of(env, episode),
                    str(solutions_of(env, episode, max_turns=max_turns)[-1]),
                    number,
                )
            )
    except BrokenEpisode as error:
        return seen, str(error)
    return seen, None


def make_records(
    seen: Sequence[EpisodeRecord],
    completions: Sequence[str],
    verdicts: Sequence[Verdict],
    rewards: Sequence[float],
    token_ids: Sequence[Sequence[int]] | None = None,
    logps: Sequence[Sequence[float]] | None = None,
    turns: Sequence[Sequence[TurnRecord]] | None = None,
) -> list[RolloutRecord]:
    """The records of P groups of completions, group after group; all but `seen` are B, one a rollout."""
    seen_B = [record for record in seen for _ in range(len(completions) // len(seen))]
    unknown: list[tuple[()]] = [()] * len(completions)
    of_tokens = token_ids or unknown, logps or unknown, turns or unknown
    rows = zip(seen_B, completions, verdicts, rewards, *of_tokens, strict=True)
    return [
        RolloutRecord(
            episode, text, verdict, reward, token_ids=tuple(ids), logps=tuple(logps_of_ids), turns=tuple(of_rollout)
        )
        for episode, text, verdict, reward, ids, logps_of_ids, of_rollout in rows
    ]


def instruction_of(messages: Sequence[Message]) -> str:
    """The last text of the user's messages, which asks."""
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


def rollout_metrics(rollouts: Sequence[RolloutRecord], group_size: int, outcomes: Sequence[str]) -> dict[str, float]:
    """The task metrics of P groups of `group_size` rollouts, group after group. Every value is a share in [0, 1].

    `accuracy`; `valid_call`; `outcome/<outcome>` and `parse/<status>`, each family summing to 1; `groups/all_right`,
    `groups/all_wrong`, `groups/mixed`, also summing to 1, from the verdicts alone: only mixed groups teach
    what is right; where the task has choices, `chosen/<c>`, the share of all rollouts that chose c, and `correct/<c>`,
    the share for which c was right; `turns/mean`, where there may be several. outcomes: the names of all there are.
    Raises ValueError unless the rollouts fill one or more whole groups.
    """
    if not rollouts or len(rollouts) % group_size:
        raise ValueError(f"{len(rollouts)} rollouts, but wanted one or more whole groups of {group_size}")
    verdicts = [rollout.verdict for rollout in rollouts]
    counts = Counter(str(verdict.outcome) for verdict in verdicts)
    statuses = Counter(verdict.parse_status for verdict in verdicts)
    chosen = Counter(rollout.chosen for rollout in rollouts)
    correct = Counter(rollout.episode.solution for rollout in rollouts)
    choices = dict.fromkeys(choice for rollout in rollouts for choice in rollout.episode.choices)
    rights = [verdict.is_right for verdict in verdicts]
    rights_per_group = [sum(rights[start : start + group_size]) for start in range(0, len(rights), group_size)]
    num_groups, total = len(rights_per_group), len(rollouts)
    all_right, all_wrong = rights_per_group.count(group_size), rights_per_group.count(0)
    num_turns = [len(rollout.turns) for rollout in rollouts]
    return {
        "accuracy": sum(rights) / total,
        **({"turns/mean": sum(num_turns) / total} if any(num_turns) else {}),
        "valid_call": sum(verdict.is_valid_call for verdict in verdicts) / total,
        **{f"outcome/{outcome}": counts[outcome] / total for outcome in outcomes},
        **{f"parse/{status}": statuses[status] / total for status in ParseStatus},
        "groups/all_right": all_right / num_groups,
        "groups/all_wrong": all_wrong / num_groups,
        "groups/mixed": (num_groups - all_right - all_wrong) / num_groups,
        **{f"chosen/{choice}": chosen[choice] / total for choice in choices},
        **{f"correct/{choice}": correct[choice] / total for choice in choices},
    }
