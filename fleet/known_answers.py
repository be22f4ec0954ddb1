"""What an environment knows of the answers to an episode: the gold one, choices, drafts, chance; each is checked.

Every consumer asks here, and gets plain values or a BrokenEpisode that names what was given. Imports no torch.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from numbers import Real
from typing import Any

from fleet.episodes import (
    BrokenEpisode,
    Episode,
    EpisodeSource,
    asked,
    checked_episode,
    require_plain,
    shown,
)
from fleet.verdicts import Observation, answer_to
from utils.images import BadImage
from utils.plain_text import printable
from utils.tool_calls import ToolCall, make_call_str, parse_call_str
from utils.tool_schemas import Tool, refusal_of


def solution_of(env: EpisodeSource, episode: Episode, turns: Sequence[ToolCall] = ()) -> ToolCall:
    """The gold answer to an episode, behind these calls. Raises BrokenEpisode unless the tools' schemas take it."""
    check = partial(_sound_call, tools=env.tools)
    return asked(lambda: env.solution(episode, tuple(turns)), check, "the gold answer", "solution")


def solutions_of(env: EpisodeSource, episode: Episode, *, max_turns: int = 1) -> list[ToolCall]:
    """The gold answers of an episode's turns, up to the one that has a verdict. Raises BrokenEpisode as solution_of."""
    calls = [solution_of(env, episode)]
    while len(calls) < max_turns and isinstance(answer_to(env, episode, calls, max_turns=max_turns), Observation):
        calls.append(solution_of(env, episode, calls))
    return calls


def answerable_episode(env: EpisodeSource, index: int) -> Episode:
    """Episode `index` as `checked_episode` gives it, with a sound gold answer and sound choices.

    Raises BrokenEpisode, which names the episode.
    """
    episode = checked_episode(env, index)
    try:
        solution_of(env, episode), choices_of(env, episode)
    except BrokenEpisode as error:
        raise BrokenEpisode(f"episode {index}: {error}") from error
    return episode


def choices_of(env: EpisodeSource, episode: Episode) -> tuple[str, ...]:
    """The names of the calls that may be chosen from, in order; none where an answer is not one of a few."""

    def check(given: Any) -> tuple[str, ...]:
        return tuple(str(_sound_call(call, env.tools)) for call in given)

    return asked(lambda: env.choices(episode), check, "the choices", "choices")


def drafts_of(env: EpisodeSource, episode: Episode) -> list[str]:
    """The completions that the environment thinks the model may say. Raises BrokenEpisode unless they are texts."""

    def check(given: Any) -> list[str]:
        for draft in [given] if isinstance(given, str) else given:
            if isinstance(given, str) or not isinstance(draft, str):
                raise BrokenEpisode(f"drafts() returned {shown(given)}, but wanted a list of completions' texts")
        return list(given)

    try:
        return asked(lambda: env.drafts(episode), check, "the drafts", "drafts")
    except (BadImage, OSError) as error:
        raise BrokenEpisode(
            f"the drafts failed with {type(error).__name__}: {printable(error)}; correct drafts()"
        ) from error


def drafts_on(env: EpisodeSource, episodes: Sequence[Episode]) -> tuple[list[list[str]], str | None]:
    """(the drafts for each episode, None); with the reason why the environment is broken, the drafts before it."""
    drafts: list[list[str]] = []
    try:
        for episode in episodes:
            drafts.append(drafts_of(env, episode))
    except BrokenEpisode as error:
        return drafts, str(error)
    return drafts, None


def chance_of(env: EpisodeSource, episode: Episode) -> float | None:
    """The share of right answers of a policy that does not look; None if the environment does not say."""

    def check(given: Any) -> float | None:
        if given is None:
            return None
        if isinstance(given, Real) and not isinstance(given, bool) and 0 <= float(given) <= 1:
            return float(given)
        raise BrokenEpisode(f"chance() returned {shown(given)}, but wanted a share from 0 to 1, or None")

    return asked(lambda: env.chance(episode), check, "chance", "chance")


def _sound_call(given: Any, tools: Sequence[Tool]) -> ToolCall:
    """The same call, its arguments plain JSON. Raises BrokenEpisode if the tools' schemas refuse it."""
    if not isinstance(given, ToolCall):
        raise BrokenEpisode(f"it is {shown(given)}, but wanted a call; return environment.ToolCall(name, arguments)")
    names = [tool["name"] for tool in tools]
    if given.name not in names:
        raise BrokenEpisode(f"it calls {given.name!r}, but the tools are {', '.join(names)}; call one of these")
    try:
        text = make_call_str(given)
        text.encode()
        arguments = json.loads(json.dumps(dict(given.arguments)))
    except (TypeError, ValueError, RecursionError) as error:
        words = printable(error)
        raise BrokenEpisode(f"its arguments are not plain JSON ({words}); give ints, floats, texts, lists") from error
    require_plain(json.dumps(arguments, ensure_ascii=False), f"the call of {given.name}")
    if (refusal := refusal_of(tools, given.name, arguments)) is not None:
        raise BrokenEpisode(f"its arguments do not fit the schema of {given.name}: {refusal}; correct one of the two")
    parsed = _parsed(text, json.dumps([dict(tool) for tool in tools]))
    if parsed.call != ToolCall(given.name, arguments):
        raise BrokenEpisode(f"its text is refused as {parsed.status}; a call has at most 4,096 characters, none odd")
    return ToolCall(given.name, arguments)


@lru_cache(maxsize=4096)
def _parsed(text: str, tools_json: str) -> Any:
    return parse_call_str(text, json.loads(tools_json))
