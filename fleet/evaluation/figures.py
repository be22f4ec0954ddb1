"""An honest evaluation: a policy's answers to held-out episodes, and to changed copies of them, become figures.

held_out.py owns which episodes are held out. Here a policy is a function from episodes to answers, so that a model, a
model in training and a script with known figures are measured alike.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from environment import Episode, EpisodeSource
from fleet import controls
from fleet.controls import Control, Edited
from fleet.episodes import BrokenEpisode
from fleet.errors import RunStopped
from fleet.evaluation.intervals import Estimate, exactly, paired_difference, pass_at_k, share
from fleet.known_answers import chance_of, choices_of, solutions_of
from fleet.run_folder import EVALUATION_SCHEMA_VERSION, finite
from fleet.verdicts import Verdict, outcome_names, verdict_on
from utils.tool_calls import ParseStatus, ToolCall

CHANGED_AT_A_TIME = 64  # episodes; their changed pictures, eight or so each, are held in memory


# the text of a rollout's only turn, or those of its turns
Said = str | tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """A policy's answers to one episode: the greedy one, and samples."""

    greedy: Said
    samples: tuple[Said, ...] = ()


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
    max_turns: int = 1
    controls: tuple[Control, ...] = tuple(Control)  # that are asked for, where the environment has them


@dataclass(frozen=True)
class Evaluation:
    """The figures as a JSON document (docs/evaluation.schema.json), and what was answered to which episode.

    is_right: for each of the episodes, True for a greedy answer that is right. hits: by control, for each of the
    episodes, True for a hit, None where the episode has no such change.
    """

    document: dict[str, Any]
    episodes: tuple[Episode, ...]
    is_right: tuple[bool, ...]
    hits: Mapping[Control, tuple[bool | None, ...]]


def evaluate(policy: Policy, plan: EvaluationPlan, model: str) -> Evaluation:
    """The figures of a policy on the plan's episodes. model: its name, for the document.

    Every process comes to the same. Raises RunStopped if the environment is broken.
    """
    answers = policy(plan.episodes, plan.num_samples)
    try:
        return _judged(policy, plan, model, answers)
    except BrokenEpisode as error:
        raise RunStopped(f"the environment is broken: {error}; correct the file of --env") from error


def _judged(policy: Policy, plan: EvaluationPlan, model: str, answers: list[Answers]) -> Evaluation:
    verdicts = [_judge(said.greedy, episode, plan) for said, episode in zip(answers, plan.episodes, strict=True)]
    offered = offered_controls(plan)
    hits = _hits_of_controls(policy, plan, verdicts, offered)
    found = {control: [hit for hit in of_control if hit is not None] for control, of_control in hits.items()}
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
        **_figures_of_answers(plan, verdicts),
        **_figures_of_samples(answers, plan),
        "controls": {
            str(control): share(sum(found[control]), len(found[control])).as_json() if control in offered else None
            for control in Control
        },
        "baseline": None,
    }
    return Evaluation(document, plan.episodes, is_right, hits)


def _hits_of_controls(
    policy: Policy, plan: EvaluationPlan, verdicts: Sequence[Verdict], offered: Sequence[Control]
) -> dict[Control, tuple[bool | None, ...]]:
    """Evaluation.hits. verdicts: on the answers to the episodes as they are."""
    hits: dict[Control, list[bool | None]] = {control: [None] * len(verdicts) for control in Control}
    for start in range(0, len(verdicts), CHANGED_AT_A_TIME):
        changes = [
            (number, *change)
            for number, verdict in enumerate(verdicts[start : start + CHANGED_AT_A_TIME], start)
            for change in _changes(plan, number, verdict, offered)
        ]
        said_to_changes = policy([change.episode for *_, change in changes], 0)
        for (number, control, change), said in zip(changes, said_to_changes, strict=True):
            verdict = _judge(said.greedy, change.episode, plan)
            is_hit = verdict.is_right if change.expected is None else verdict.call == change.expected
            hits[control][number] = is_hit
    return {control: tuple(of_control) for control, of_control in hits.items()}


def with_baseline(evaluation: Evaluation, baseline: Evaluation) -> Evaluation:
    """The evaluation with another model's on the same episodes beside it, and their paired difference."""
    difference = paired_difference(evaluation.is_right, baseline.is_right).as_json()
    beside = {key: value for key, value in baseline.document.items() if key != "baseline"}
    return replace(evaluation, document=evaluation.document | {"baseline": beside | {"difference": difference}})


def offered_controls(plan: EvaluationPlan) -> list[Control]:
    """Those of the plan's controls that the environment has, as its first episode with its gold answer shows."""
    first = controls.with_pictures_opened(plan.episodes[0], plan.max_pixels)
    call = _gold(plan, first)
    rng = random.Random(f"controls/{plan.seed}")
    return [
        control for control in plan.controls if controls.checked_edit(plan.env, first, control, call, rng) is not None
    ]


def level_without_looking(plan: EvaluationPlan) -> float:
    """The share of the plan's episodes that chance, or always the same answer, gets right: the larger of the two."""
    chances = [chance_of(plan.env, episode) or 0.0 for episode in plan.episodes]
    rights = Counter(str(_gold(plan, episode)) for episode in plan.episodes)
    return max(sum(chances), rights.most_common(1)[0][1]) / len(plan.episodes)


def headline_figures(document: dict[str, Any]) -> dict[str, float]:
    """The figures of a document that are worth a curve: greedy accuracy and every control that has a value."""
    figures = {"greedy_accuracy": document["greedy_accuracy"], **document["controls"]}
    return {name: figure["value"] for name, figure in figures.items() if figure and figure["value"] is not None}


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


def confusion(judged: Iterable[tuple[str, str | None]], choices: Sequence[str]) -> list[list[int]]:
    """Counts by right choice (row) and the choice made (column) of (right choice, choice made) pairs.

    The last column counts answers that make no choice, as None does.
    """
    places = {choice: place for place, choice in enumerate(choices)}
    counts = [[0] * (len(choices) + 1) for _ in choices]
    for right, chosen in judged:
        counts[places[right]][len(choices) if chosen is None else places[chosen]] += 1
    return counts


def _judge(said: Said, episode: Episode, plan: EvaluationPlan) -> Verdict:
    return verdict_on(plan.env, episode, said, allow_reasoning=plan.allow_reasoning, max_turns=plan.max_turns)


def _gold(plan: EvaluationPlan, episode: Episode) -> ToolCall:
    """The gold answer that has a verdict: of the last turn."""
    return solutions_of(plan.env, episode, max_turns=plan.max_turns)[-1]


def _changes(
    plan: EvaluationPlan, number: int, verdict: Verdict, offered: Sequence[Control]
) -> Iterator[tuple[Control, Edited]]:
    """Each change of an episode; things move only around one that was picked by a valid call."""
    episode = controls.with_pictures_opened(plan.episodes[number], plan.max_pixels)
    # a change for which any call will do takes the gold answer
    call = verdict.call if verdict.call is not None and verdict.is_valid_call else None
    for control in controls.OF_EVERY_ANSWER + (() if call is None else controls.OF_A_VALID_CALL):
        if control in offered:
            given = call or _gold(plan, episode)
            # of its own, so that a change is the same whichever others are asked for
            rng = random.Random(f"controls/{plan.seed}/{number}/{control}")
            if (change := controls.checked_edit(plan.env, episode, control, given, rng)) is not None:
                yield control, change


def _figures_of_answers(plan: EvaluationPlan, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    n = len(plan.episodes)
    outcomes = Counter(str(verdict.outcome) for verdict in verdicts)
    statuses = Counter(verdict.parse_status for verdict in verdicts)
    chances = [chance_of(plan.env, episode) for episode in plan.episodes]
    known = [chance for chance in chances if chance is not None]
    return {
        "greedy_accuracy": share(sum(verdict.is_right for verdict in verdicts), n).as_json(),
        "chance": exactly(sum(known) / n, n).as_json() if len(known) == n else None,
        "outcome": {name: share(outcomes[name], n).as_json() for name in outcome_names(plan.env, plan.max_turns)},
        "parse_status": {status.value: share(statuses[status], n).as_json() for status in ParseStatus},
        **_figures_of_choices(plan, verdicts),
    }


def _figures_of_choices(plan: EvaluationPlan, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The figures of a task whose answer is one of a few choices; null for any other."""
    offered = [choices_of(plan.env, episode) for episode in plan.episodes]
    choices = list(dict.fromkeys(choice for of_episode in offered for choice in of_episode))
    names = ("choices", "best_constant_choice", "accuracy_by_choice", "confusion")
    rights = [str(_gold(plan, episode)) for episode in plan.episodes]
    if not choices or not set(rights) <= set(choices):
        return dict.fromkeys(names)
    said = [str(verdict.call) for verdict in verdicts]
    made = [name if name in of_episode else None for name, of_episode in zip(said, offered, strict=True)]
    counts = confusion(zip(rights, made, strict=True), choices)
    right = Counter(rights)
    best = max(choices, key=lambda choice: right[choice])
    return {
        "choices": choices,
        "best_constant_choice": {**share(right[best], len(rights)).as_json(), "choice": best},
        "accuracy_by_choice": {
            choice: share(counts[place][place], right[choice]).as_json() for place, choice in enumerate(choices)
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
