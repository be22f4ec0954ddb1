"""An honest evaluation: a policy's answers to held-out episodes, and to changed copies of them, become figures.

held_out.py owns which episodes are held out. Here a policy is a function from episodes to answers, so that a model, a
model in training and a script with known figures are measured alike.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from environment import Episode, EpisodeSource, Judgement, Outcome, judge
from fleet import controls
from fleet.evaluation.intervals import Estimate, exactly, paired_difference, pass_at_k, share
from fleet.run_folder import EVALUATION_SCHEMA_VERSION, finite
from utils.tool_calls import ParseStatus

CHANGED_AT_A_TIME = 64  # episodes; their changed pictures, eight or so each, are held in memory


@dataclass(frozen=True)
class Answers:
    """A policy's answers to one episode: the greedy one, and samples."""

    greedy: str
    samples: tuple[str, ...] = ()


# (episodes, number of samples) -> an Answers for each episode, in order
Policy = Callable[[Sequence[Episode], int], list[Answers]]


@dataclass(frozen=True)
class EvaluationPlan:
    """The held-out episodes of a seed, in order, and how they are answered."""

    env: EpisodeSource
    episodes: tuple[Episode, ...]
    seed: int
    num_passed_over: int = 0  # episodes that were left out, as the run had drawn the same
    num_samples: int = 0  # per episode, besides the greedy answer
    ks: tuple[int, ...] = ()  # of pass@k, each from 1 to num_samples
    allow_reasoning: bool = False
    prompt_style: str = "direct"
    max_pixels: int | None = None  # budget of one image, which changed pictures keep to as well


@dataclass(frozen=True)
class Evaluation:
    """The figures as a JSON document (docs/evaluation.schema.json); True for each greedy answer that is right."""

    document: dict[str, Any]
    is_right: tuple[bool, ...]


def evaluate(policy: Policy, plan: EvaluationPlan, model: str) -> Evaluation:
    """The figures of a policy on the plan's episodes. model: its name, for the document."""
    answers = policy(plan.episodes, plan.num_samples)
    verdicts = [_judge(said.greedy, episode, plan) for said, episode in zip(answers, plan.episodes, strict=True)]
    hits: dict[str, list[bool]] = {control: [] for control in controls.CONTROL_MEANINGS}
    for start in range(0, len(verdicts), CHANGED_AT_A_TIME):
        numbered = enumerate(verdicts[start : start + CHANGED_AT_A_TIME], start)
        changes = [change for number, verdict in numbered for change in _changes(plan, number, verdict)]
        said_to_changes = policy([episode for _, episode, _ in changes], 0)
        for (control, episode, wanted_index), said in zip(changes, said_to_changes, strict=True):
            hits[control].append(_judge(said.greedy, episode, plan).index == wanted_index)
    is_right = tuple(verdict.is_right for verdict in verdicts)
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
        **_figures_of_answers(verdicts, plan.episodes),
        **_figures_of_samples(answers, plan),
        "controls": {control: share(sum(found), len(found)).as_json() for control, found in hits.items()},
        "baseline": None,
    }
    return Evaluation(document, is_right)


def with_baseline(evaluation: Evaluation, baseline: Evaluation) -> Evaluation:
    """The evaluation with another model's on the same episodes beside it, and their paired difference."""
    difference = paired_difference(evaluation.is_right, baseline.is_right).as_json()
    beside = {key: value for key, value in baseline.document.items() if key != "baseline"}
    return replace(evaluation, document=evaluation.document | {"baseline": beside | {"difference": difference}})


def headline_figures(document: dict[str, Any]) -> dict[str, float]:
    """The figures of a document that are worth a curve: greedy accuracy and every control that has a value."""
    figures = {"greedy_accuracy": document["greedy_accuracy"], **document["controls"]}
    return {name: figure["value"] for name, figure in figures.items() if figure["value"] is not None}


def estimate_at(document: Mapping[str, Any], *keys: str) -> Estimate | None:
    """The estimate under nested keys of a document; None if there is none, or one without a value."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    value = finite(found.get("value")) if isinstance(found, Mapping) else None
    if value is None:
        return None
    low, high = (finite(end) for end in found.get("ci95") or (None, None))
    return Estimate(value, (value if low is None else low, value if high is None else high), int(found.get("n") or 0))


def percent_at(document: Mapping[str, Any], *keys: str) -> str:
    """The figure under nested keys with its interval, as "73.3 % (61.0 to 82.9)"; "-" without a value."""
    estimate = estimate_at(document, *keys)
    if estimate is None or estimate.value is None:
        return "-"
    interval = estimate.interval(" to ")
    return f"{100 * estimate.value:.1f} %{f' ({interval})' if interval else ''}"


def confusion(judged: Iterable[tuple[int, Judgement]], num_candidates: int) -> list[list[int]]:
    """Counts by correct index (row) and picked index (column) of (correct index, verdict) pairs.

    The last column counts answers that pick no candidate.
    """
    counts = [[0] * (num_candidates + 1) for _ in range(num_candidates)]
    for correct_index, verdict in judged:
        picked = _picked_index(verdict)
        counts[correct_index][num_candidates if picked is None else picked] += 1
    return counts


def _judge(text: str, episode: Episode, plan: EvaluationPlan) -> Judgement:
    return judge(text, episode.correct_index, episode.num_candidates, allow_reasoning=plan.allow_reasoning)


def _picked_index(verdict: Judgement) -> int | None:
    """The candidate that an answer picks; None if it picks none."""
    return verdict.index if verdict.is_valid_call else None


def _changes(plan: EvaluationPlan, number: int, verdict: Judgement) -> Iterator[tuple[str, Episode, int]]:
    """(control, changed episode, index that is a hit) of each change; pictures move only around one that was picked."""
    episode, rng = plan.episodes[number], random.Random(f"controls/{plan.seed}/{number}")
    yield "blank_images", controls.blanked(episode, plan.max_pixels), episode.correct_index
    yield "redrawn_images", controls.with_pictures_redrawn(episode, rng, plan.max_pixels), episode.correct_index
    picked = _picked_index(verdict)
    if picked is None:
        return
    swapped = controls.with_picture_swapped(episode, picked, rng)
    if swapped is not None:
        yield "swapped_images", *swapped
    permuted = controls.with_order_permuted(plan.env, episode, picked, rng)
    if permuted is not None:
        yield "permuted_order", permuted, picked


def _figures_of_answers(verdicts: Sequence[Judgement], episodes: Sequence[Episode]) -> dict[str, Any]:
    n = len(episodes)
    size = max(episode.num_candidates for episode in episodes)
    correct = Counter(episode.correct_index for episode in episodes)
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    statuses = Counter(verdict.parse_status for verdict in verdicts)
    counts = confusion(zip((episode.correct_index for episode in episodes), verdicts, strict=True), size)
    best_index, best_count = max(sorted(correct.items()), key=lambda item: item[1])
    return {
        "candidates": size,
        "greedy_accuracy": share(outcomes[Outcome.CORRECT], n).as_json(),
        "chance": exactly(sum(1 / episode.num_candidates for episode in episodes) / n, n).as_json(),
        "best_constant_index": {**share(best_count, n).as_json(), "index": best_index},
        "outcome": {outcome.value: share(outcomes[outcome], n).as_json() for outcome in Outcome},
        "parse_status": {status.value: share(statuses[status], n).as_json() for status in ParseStatus},
        "accuracy_by_correct_index": {
            str(index): share(counts[index][index], correct[index]).as_json() for index in range(size)
        },
        "confusion": counts,
    }


def _figures_of_samples(answers: Sequence[Answers], plan: EvaluationPlan) -> dict[str, Any]:
    """Sampled accuracy and pass@k; an episode is one trial, because its samples share its difficulty."""
    n, num_samples = len(plan.episodes), plan.num_samples
    if num_samples == 0:
        return {"sampled_accuracy": None, "pass_at_k": {}}
    num_right = [
        sum(_judge(text, episode, plan).is_right for text in said.samples)
        for said, episode in zip(answers, plan.episodes, strict=True)
    ]
    passes = {k: sum(pass_at_k(num_samples, right, k) for right in num_right) for k in plan.ks}
    return {
        "sampled_accuracy": share(sum(num_right) / num_samples, n).as_json(),
        "pass_at_k": {str(k): share(min(total, n), n).as_json() for k, total in passes.items()},
    }
