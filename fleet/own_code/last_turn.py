"""LastTurn: an environment of several turns as one of a single turn, behind the gold answers of those before it.

So every check of a call's verdict holds for the call that ends a rollout, and what tools answer on the way there is
checked too. Imports no torch.
"""

from collections.abc import Sequence
from enum import EnumType, StrEnum
from functools import cached_property
from typing import Any

from PIL import Image

from fleet.episodes import BrokenEpisode, Episode, EpisodeSource
from fleet.known_answers import solutions_of
from fleet.verdicts import OUT_OF_TURNS, Observation, Verdict, answer_to, problem_of_observation, sound_observation
from utils.images import image_digest
from utils.tool_calls import ToolCall


class LastTurn:
    """All that the environment has, but for what it answers: only the last of `max_turns` turns is left."""

    def __init__(self, env: EpisodeSource, max_turns: int):
        self.env, self._max_turns = env, max_turns

    def __getattr__(self, name: str) -> Any:
        if name == "env":
            raise AttributeError(name)  # of a copy that is not filled in yet
        return getattr(self.env, name)

    @cached_property
    def outcomes(self) -> Any:
        """The environment's, and that of a rollout which has no turn left."""
        own: Any = self.env.outcomes
        is_there = not isinstance(own, EnumType) or OUT_OF_TURNS in list(own)
        return (
            own if is_there else StrEnum("Outcome", [(one.name, one.value) for one in own] + [("_OUT", OUT_OF_TURNS)])
        )

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        """The gold answer that has a verdict. Raises BrokenEpisode if none has, or a tool's answer cannot be shown."""
        golds = solutions_of(self.env, episode, max_turns=self._max_turns)
        for end in range(1, len(golds) + 1):
            answer = answer_to(self.env, episode, golds[:end], max_turns=self._max_turns)
            if not isinstance(answer, Observation):
                continue
            if end == len(golds):
                raise BrokenEpisode(
                    f"there is no verdict after {end} gold answers, the last of them {golds[-1]}; pass a greater "
                    "--max_turns, or correct solution() or respond()"
                )
            if (problem := problem_of_observation(answer)) is not None:
                raise BrokenEpisode(f"the answer to {golds[end - 1]} cannot be shown: {problem}")
            again = answer_to(self.env, episode, golds[:end], max_turns=self._max_turns)
            if not isinstance(again, Observation) or _comparable(again) != _comparable(answer):
                raise BrokenEpisode(
                    f"the answer to {golds[end - 1]} was another one when asked again; derive it from the episode and "
                    "the calls alone"
                )
        return golds[-1]

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        """The environment's answer to a call in place of the last gold one."""
        before = solutions_of(self.env, episode, max_turns=self._max_turns)[:-1]
        answer = self.env.respond(episode, (*before, *turns))
        if isinstance(answer, Observation):
            sound_observation(answer)
            return Verdict(OUT_OF_TURNS, is_right=False)
        return answer


def _comparable(observation: Observation) -> tuple[Any, ...]:
    """Equal for equal texts, paths and pictures."""
    images = (image_digest(image) if isinstance(image, Image.Image) else image for image in observation.images)
    return (observation.text, *images)
