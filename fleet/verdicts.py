"""Verdict and Observation: what an environment answers to a call, and the check of all that it gives for one.

Owns the way from a completion to a verdict, which every consumer takes: parsed by the environment's tools, refused with
the parse status, else judged by `respond`. Imports no torch.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import EnumType, StrEnum
from functools import partial
from numbers import Real
from typing import Any

from PIL import Image

from fleet.episodes import (
    BrokenEpisode,
    Episode,
    EpisodeSource,
    ImageSource,
    asked,
    images_from,
    shown,
    text_from,
)
from utils.images import BadImage, open_image
from utils.plain_text import QWEN_ADDED_TOKENS, NotPlainText, printable, require_plain_text
from utils.tool_calls import ParseStatus, ToolCall, parse_call_str
from utils.tool_schemas import BadTool, checked_tools

MAX_COMPONENT = 1e6  # a component beyond it turns its siblings' rewards into rounding errors in float32
UNPARSABLE = "unparsable"  # the outcome of a refused call, in every environment
# the outcomes of a rollout that ended although a tool had answered, where it may have several turns: it had used them
# up; the answer, or the turn's own end, did not fit into its room; what the tool answered cannot be shown
OUT_OF_TURNS, OUT_OF_CONTEXT, BAD_OBSERVATION = "out_of_turns", "out_of_context", "bad_observation"
# the components of a verdict that names none; --reward_correct and --reward_valid_call weigh these two
CORRECT, VALID_CALL = "correct", "valid_call"


@dataclass(frozen=True)
class Verdict:
    """What an answer amounts to, decided once, by the environment.

    outcome: a member of the environment's `outcomes`, or `unparsable`; Fleet hands it on as plain text. is_right: true
    for what counts as right.
    components: named parts of the reward, finite and within a million of 0; where the environment names none, `correct`
    (1 if right) and `valid_call` (1). parse_status, call: of the completion, filled in by Fleet.
    """

    outcome: str
    is_right: bool
    components: Mapping[str, float] = field(default_factory=dict)
    parse_status: ParseStatus = ParseStatus.OK
    call: ToolCall | None = None

    def __post_init__(self) -> None:
        if not self.components and self.parse_status is ParseStatus.OK:
            object.__setattr__(self, "components", {CORRECT: float(bool(self.is_right)), VALID_CALL: 1.0})

    @property
    def is_valid_call(self) -> bool:
        """True for a call that was parsed, unless its component `valid_call` is 0."""
        return self.parse_status is ParseStatus.OK and self.components.get(VALID_CALL, 1.0) > 0


@dataclass(frozen=True)
class Observation:
    """What a tool answers before the model goes on: text, and images as an Episode has them. Needs --max_turns."""

    text: str = ""
    images: tuple[ImageSource, ...] = ()


def verdict_on(
    env: EpisodeSource,
    episode: Episode,
    said: str | Sequence[str],
    *,
    allow_reasoning: bool = False,
    max_turns: int = 1,
) -> Verdict:
    """The verdict on a rollout. A wrong answer is a verdict, never an error.

    said: its turns' texts without their end-of-turn tokens, or the text of its only turn. Raises BrokenEpisode if the
    environment fails on a call that fits its schema, gives anything but a verdict or an observation, or an observation
    where there is but one turn.
    """
    texts, calls = [said] if isinstance(said, str) else said, list[ToolCall]()
    for text in texts:
        parsed = parse_call_str(text, env.tools, allow_reasoning=allow_reasoning)
        if parsed.call is None:
            return Verdict(UNPARSABLE, is_right=False, parse_status=parsed.status)
        calls.append(parsed.call)
        answer = answer_to(env, episode, calls, max_turns=max_turns)
        if isinstance(answer, Verdict):
            return answer
    assert calls and isinstance(answer, Observation), "a rollout has a turn at least"
    if len(calls) >= max_turns:
        outcome = OUT_OF_TURNS
    else:
        outcome = OUT_OF_CONTEXT if problem_of_observation(answer) is None else BAD_OBSERVATION
    # it made no choice, and earns nothing
    return Verdict(outcome, is_right=False, components={CORRECT: 0.0, VALID_CALL: 0.0})


def verdicts_on(
    env: EpisodeSource,
    episodes: Sequence[Episode],
    said: Sequence[str | Sequence[str]],
    *,
    allow_reasoning: bool = False,
    max_turns: int = 1,
) -> tuple[list[Verdict], str | None]:
    """(the verdict on each rollout, None); with the reason why the environment is broken, the verdicts before it."""
    verdicts: list[Verdict] = []
    try:
        for episode, texts in zip(episodes, said, strict=True):
            verdicts.append(verdict_on(env, episode, texts, allow_reasoning=allow_reasoning, max_turns=max_turns))
    except BrokenEpisode as error:
        return verdicts, str(error)
    return verdicts, None


def verdict_on_call(env: EpisodeSource, episode: Episode, call: ToolCall) -> Verdict:
    """The verdict on a call that fits the tools' schemas. Raises BrokenEpisode as `verdict_on` does."""
    verdict = answer_to(env, episode, (call,))
    assert isinstance(verdict, Verdict), "there is one turn"
    return verdict


def answer_to(
    env: EpisodeSource, episode: Episode, calls: Sequence[ToolCall], *, max_turns: int = 1
) -> Observation | Verdict:
    """What the environment answers to the last of these calls, which fit its tools. Raises as `verdict_on` does."""
    check = partial(_sound_answer, outcomes=env.outcomes, has_turns=max_turns > 1)
    name = f"the verdict on the call {printable(_shortened(str(calls[-1])))}"
    try:
        answer = asked(lambda: env.respond(episode, tuple(calls)), check, name, "respond")
    # the picture is not at fault: it was opened before it was shown
    except (BadImage, OSError) as error:
        raise BrokenEpisode(
            f"{name} failed with {type(error).__name__}: {printable(error)} (in respond()); correct it"
        ) from error
    return replace(answer, call=calls[-1]) if isinstance(answer, Verdict) else answer


def shown_images(
    observation: Observation, max_pixels: int | None = None, literals: Collection[str] = QWEN_ADDED_TOKENS
) -> list[Image.Image]:
    """An observation's images as the model is shown them. literals: the texts of its tokens.

    Raises NotPlainText for a text that holds one, BadImage or OSError for an image that cannot be shown.
    """
    require_plain_text(observation.text, "an observation's text", literals)
    return [open_image(image, max_pixels) for image in observation.images]


def problem_of_observation(observation: Observation) -> str | None:
    """The reason why an observation cannot be shown to a model; None if it can."""
    try:
        shown_images(observation)
    except (NotPlainText, BadImage, OSError) as error:
        return str(error)
    return None


def outcome_names(env: EpisodeSource, max_turns: int = 1) -> list[str]:
    """The names of every outcome of the environment, and behind them those of Fleet that are not among its own."""
    of_turns = [OUT_OF_TURNS, OUT_OF_CONTEXT, BAD_OBSERVATION] if max_turns > 1 else []
    return list(dict.fromkeys([*(outcome.value for outcome in env.outcomes), UNPARSABLE, *of_turns]))


def require_sound_task(env: EpisodeSource) -> None:
    """Raises BrokenEpisode unless the environment's tools and outcomes can be used."""
    try:
        checked_tools(env.tools)
    except BadTool as error:
        raise BrokenEpisode(str(error)) from error
    outcomes: Any = env.outcomes
    if not isinstance(outcomes, EnumType) or not issubclass(outcomes, StrEnum) or not len(outcomes):
        raise BrokenEpisode(
            f"outcomes is {shown(outcomes)}, but wanted an enum of texts; write class Outcome(StrEnum) with a member "
            "for each way that an answer can end, and outcomes = Outcome"
        )


def _sound_answer(given: Any, outcomes: type[StrEnum], has_turns: bool) -> Observation | Verdict:
    """The same verdict or observation, its values converted to their types. Raises BrokenEpisode."""
    if isinstance(given, Observation):
        if not has_turns:
            raise BrokenEpisode(
                "respond() returned an Observation, but there is one turn; pass --max_turns 2 or more, or return a "
                "Verdict on the first call"
            )
        return sound_observation(given)
    if has_turns and not isinstance(given, Verdict):
        raise BrokenEpisode(f"respond() returned {shown(given)}, but wanted a Verdict or an Observation; return one")
    return _sound_verdict(given, outcomes)


def sound_observation(given: Observation) -> Observation:
    """The same observation, its images converted as an Episode's are. Raises BrokenEpisode for another type."""
    return Observation(text_from(given.text, "the text of its observation"), images_from(given.images))


def _sound_verdict(given: Any, outcomes: type[StrEnum]) -> Verdict:
    """The same verdict, its values converted to their types. Raises BrokenEpisode."""
    if not isinstance(given, Verdict):
        raise BrokenEpisode(f"respond() returned {shown(given)}, but wanted a Verdict; return environment.Verdict(...)")
    if given.outcome not in list(outcomes):
        names = ", ".join(outcomes)
        raise BrokenEpisode(f"its outcome is {shown(given.outcome)}, but wanted one of {names}; add it to outcomes")
    if not isinstance(given.is_right, bool) and str(getattr(given.is_right, "dtype", "")) not in ("bool", "torch.bool"):
        raise BrokenEpisode(f"its is_right is {shown(given.is_right)}, but wanted True or False")
    if not isinstance(given.components, Mapping):
        raise BrokenEpisode(f"its components are {shown(given.components)}, but wanted a number by its name")
    components = {_sound_name(name): _sound_component(name, value) for name, value in given.components.items()}
    return Verdict(outcomes(given.outcome).value, bool(given.is_right), components)


def _shortened(text: str) -> str:
    """The text's first 200 characters: a policy may write thousands."""
    return f"{text[:200]}{'…' if len(text) > 200 else ''}"


def _sound_name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise BrokenEpisode(f"a component is named {shown(name)}, but wanted a word such as near_miss; rename it")
    return name


def _sound_component(name: str, value: Any) -> float:
    try:
        number = value.item() if hasattr(value, "item") else value
        component = float(number) if isinstance(number, Real | Decimal) else math.nan
    # an array of several numbers, an integer that no float holds
    except (ArithmeticError, TypeError, ValueError):
        component = math.nan
    if abs(component) <= MAX_COMPONENT:
        return component
    raise BrokenEpisode(
        f"its component {name} is {shown(value)}, but wanted a finite number within a million of 0; correct it"
    )
