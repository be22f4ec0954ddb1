"""An honest evaluation: held-out episodes, what a policy answers to them, and what it answers once they are changed.

Owns how answers become figures; which episodes are held out is in held_out.py. Knows a policy only as a function from
episodes to answers, so that a model, a script with known figures and a model in training are measured alike.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from environment import Episode, EpisodeSource, Judgement, Outcome, judge
from fleet.controls import blanked, with_order_permuted, with_picture_swapped, with_pictures_redrawn
from fleet.evaluation.intervals import exactly, paired_difference, pass_at_k, share
from fleet.run_folder import EVALUATION_SCHEMA_VERSION
from utils.tool_calls import ParseStatus

CONTROLS = ("blank_images", "swapped_images", "permuted_order", "redrawn_images")
# Changed pictures are held in memory, eight or so an episode.
CHANGED_AT_A_TIME = 64


@dataclass(frozen=True)
class Answers:
    """What a policy says to one episode: its greedy answer, and samples."""

    greedy: str
    samples: tuple[str, ...] = ()


# Answers these episodes in order, each with a greedy answer and so many samples.
Policy = Callable[[Sequence[Episode], int], list[Answers]]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured: the held-out episodes of a seed, in order, and how.

    num_passed_over: episodes that were left out because the run had drawn their like. num_samples: per episode, besides
    the greedy answer. ks: of pass@k, each from 1 to num_samples.
    """

    env: EpisodeSource
    episodes: tuple[Episode, ...]
    seed: int
    num_passed_over: int = 0
    num_samples: int = 0
    ks: tuple[int, ...] = ()
    allow_reasoning: bool = False
    prompt_style: str = "direct"
    max_pixels: int | None = None  # budget of one image, which changed pictures keep to as well


@dataclass(frozen=True)
class Evaluation:
    """The figures as a JSON document (docs/evaluation.schema.json), and which greedy answers were right."""

    document: dict[str, Any]
    is_right: tuple[bool, ...]


@dataclass(frozen=True)
class _Change:
    """A changed episode. `index` is the answer that counts as a hit, None if that is the episode's right one."""

    control: str
    episode: Episode
    index: int | None = None


def evaluate(policy: Policy, plan: EvaluationPlan, model: str) -> Evaluation:
    """The figures of a policy on the plan's episodes. model: its name, for the document."""
    answers = policy(plan.episodes, plan.num_samples)
    verdicts = [_judge(said.greedy, episode, plan) for said, episode in zip(answers, plan.episodes, strict=True)]
    hits: dict[str, list[bool]] = {control: [] for control in CONTROLS}
    for start in range(0, len(verdicts), CHANGED_AT_A_TIME):
        _count_hits(policy, plan, start, verdicts[start : start + CHANGED_AT_A_TIME], hits)
    is_right = tuple(verdict.outcome is Outcome.CORRECT for verdict in verdicts)
    document = {
        "schema_version": EVALUATION_SCHEMA_VERSION,
        "model": model,
        "step": None,
        "episodes": len(plan.episodes),
        "seed": plan.seed,
        "passed_over": plan.num_passed_over,
        "num_samples": plan.num_samples,
        "prompt_style": plan.prompt_style,
        "allow_reasoning": plan.allow_reasoning,
        "candidates": max(episode.num_candidates for episode in plan.episodes),
        **_figures_of_answers(verdicts, plan.episodes),
        **_figures_of_samples(answers, plan),
        "controls": {
            control: share(sum(of_control), len(of_control)).as_json() for control, of_control in hits.items()
        },
        "baseline": None,
    }
    return Evaluation(document, is_right)


def with_baseline(evaluation: Evaluation, baseline: Evaluation) -> Evaluation:
    """The evaluation with another model's on the same episodes beside it, and their paired difference."""
    of_both = paired_difference(evaluation.is_right, baseline.is_right)
    difference = {**asdict(of_both), "ci95": list(of_both.ci95)}
    difference["only_model_right"] = difference.pop("only_first_right")
    difference["only_baseline_right"] = difference.pop("only_second_right")
    beside = {key: value for key, value in baseline.document.items() if key != "baseline"}
    return replace(evaluation, document=evaluation.document | {"baseline": beside | {"difference": difference}})


def headline_figures(document: dict[str, Any]) -> dict[str, float]:
    """The figures of a document that are worth a curve: greedy accuracy and every control that has a value."""
    figures = {"greedy_accuracy": document["greedy_accuracy"], **document["controls"]}
    return {name: figure["value"] for name, figure in figures.items() if figure["value"] is not None}


def _judge(text: str, episode: Episode, plan: EvaluationPlan) -> Judgement:
    return judge(text, episode.correct_index, episode.num_candidates, allow_reasoning=plan.allow_reasoning)


def _is_pick(verdict: Judgement) -> bool:
    return verdict.outcome in (Outcome.CORRECT, Outcome.WRONG_INDEX)


def _count_hits(
    policy: Policy, plan: EvaluationPlan, start: int, verdicts: Sequence[Judgement], hits: dict[str, list[bool]]
) -> None:
    """Adds to `hits` what the policy answers to the changes of the episodes from number `start` on."""
    changes = [change for number, verdict in enumerate(verdicts, start) for change in _changes(plan, number, verdict)]
    answers = policy([change.episode for change in changes], 0)
    for change, said in zip(changes, answers, strict=True):
        verdict = _judge(said.greedy, change.episode, plan)
        if change.index is None:
            is_hit = verdict.outcome is Outcome.CORRECT
        else:
            is_hit = _is_pick(verdict) and verdict.index == change.index
        hits[change.control].append(is_hit)


def _changes(plan: EvaluationPlan, number: int, verdict: Judgement) -> list[_Change]:
    """What one episode is changed to; pictures move only around one that was picked."""
    env, episode, rng = plan.env, plan.episodes[number], random.Random(f"controls/{plan.seed}/{number}")
    changes = [
        _Change("blank_images", blanked(episode, plan.max_pixels)),
        _Change("redrawn_images", with_pictures_redrawn(episode, rng, plan.max_pixels)),
    ]
    if not _is_pick(verdict) or verdict.index is None:
        return changes
    swapped = with_picture_swapped(episode, verdict.index, rng)
    if swapped is not None:
        changes.append(_Change("swapped_images", *swapped))
    permuted = with_order_permuted(env, episode, verdict.index, rng)
    if permuted is not None:
        changes.append(_Change("permuted_order", permuted, verdict.index))
    return changes


def _figures_of_answers(verdicts: Sequence[Judgement], episodes: Sequence[Episode]) -> dict[str, Any]:
    n = len(episodes)
    size = max(episode.num_candidates for episode in episodes)
    correct = Counter(episode.correct_index for episode in episodes)
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    statuses = Counter(verdict.parse_status for verdict in verdicts)
    # the last column counts answers that pick no candidate
    confusion = [[0] * (size + 1) for _ in range(size)]
    for episode, verdict in zip(episodes, verdicts, strict=True):
        column = verdict.index if _is_pick(verdict) and verdict.index is not None else size
        confusion[episode.correct_index][column] += 1
    best_index, best_count = max(sorted(correct.items()), key=lambda item: item[1])
    return {
        "greedy_accuracy": share(outcomes[Outcome.CORRECT], n).as_json(),
        "chance": exactly(sum(1 / episode.num_candidates for episode in episodes) / n, n).as_json(),
        "best_constant_index": {**share(best_count, n).as_json(), "index": best_index},
        "outcome": {outcome.value: share(outcomes[outcome], n).as_json() for outcome in Outcome},
        "parse_status": {status.value: share(statuses[status], n).as_json() for status in ParseStatus},
        "accuracy_by_correct_index": {
            str(index): share(confusion[index][index], correct[index]).as_json() for index in range(size)
        },
        "confusion": confusion,
    }


def _figures_of_samples(answers: Sequence[Answers], plan: EvaluationPlan) -> dict[str, Any]:
    """Sampled accuracy and pass@k; an episode is one trial, because its samples share its difficulty."""
    n, num_samples = len(plan.episodes), plan.num_samples
    if num_samples == 0:
        return {"sampled_accuracy": None, "pass_at_k": {}}
    num_right = [
        sum(_judge(text, episode, plan).outcome is Outcome.CORRECT for text in said.samples)
        for said, episode in zip(answers, plan.episodes, strict=True)
    ]
    passes = {k: sum(pass_at_k(num_samples, right, k) for right in num_right) for k in plan.ks}
    return {
        "sampled_accuracy": share(sum(num_right) / num_samples, n).as_json(),
        "pass_at_k": {str(k): share(min(total, n), n).as_json() for k, total in passes.items()},
    }
