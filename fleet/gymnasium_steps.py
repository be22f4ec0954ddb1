"""GymnasiumSteps: `reset` and `step` on an environment's episodes, tools and verdicts, as Gymnasium has them.

An adapter for scripts and other libraries. Training and evaluation do not step: they ask for whole answers.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, replace
from typing import Any

from fleet.episodes import Episode, Message
from fleet.verdicts import UNPARSABLE, Observation, Verdict
from utils.tool_calls import ToolCall, parse_call_str
from utils.tool_schemas import Tool


class GymnasiumSteps:
    """The next episode with `reset`, its answer with `step`; environment.Environment has all that they use."""

    tools: Sequence[Tool]
    allow_reasoning: bool
    seed: int
    _reset_seed: int | None = None
    _next_index = 0
    _current: Episode | None = None
    _turns: tuple[ToolCall, ...] = ()

    def episode(self, index: int) -> Episode:
        """Episode `index`."""
        raise NotImplementedError

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        """The answer to the last of the calls so far."""
        raise NotImplementedError

    def prompt_messages(self, episode: Episode) -> list[Message]:
        """The chat messages that the model reads."""
        raise NotImplementedError

    def draw_episode(self, seed: int, index: int) -> Episode:
        """Episode `index` of any seed."""
        seeded = copy(self)
        seeded.seed = seed
        return seeded.episode(index)

    def reset(self, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The next episode's (observation, info); with `seed`, the first episode of that seed."""
        if seed is not None:
            self._reset_seed, self._next_index = seed, 0
        drawn = self.draw_episode(self.seed if self._reset_seed is None else self._reset_seed, self._next_index)
        self._current, self._turns = replace(drawn, messages=tuple(self.prompt_messages(drawn))), ()
        self._next_index += 1
        observation = {"images": self._current.images, "messages": list(self._current.messages)}
        return observation, {"episode": self._current}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, False, info) of answering with the text `action`; 1.0 for a right answer.

        A verdict ends the episode, with observation None. Raises RuntimeError before `reset`.
        """
        if self._current is None:
            raise RuntimeError("step() without an episode: it has ended or not begun; call reset() first")
        episode, parsed = self._current, parse_call_str(action, self.tools, allow_reasoning=self.allow_reasoning)
        answer: Observation | Verdict = Verdict(UNPARSABLE, is_right=False, parse_status=parsed.status)
        if parsed.call is not None:
            self._turns = (*self._turns, parsed.call)
            answer = self.respond(episode, self._turns)
        if isinstance(answer, Observation):
            return {"text": answer.text, "images": answer.images}, 0.0, False, False, {"call": parsed.call}
        self._current = None
        return None, float(answer.is_right), True, False, asdict(replace(answer, call=None)) | {"call": parsed.call}
