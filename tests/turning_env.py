"""An environment of two turns and more for the tests: a picture that is picked is shown again before it counts."""

from collections.abc import Sequence

from environment import Episode, PickImageEnv, ToolCall, Verdict
from fleet.verdicts import Observation


class LookAgainEnv(PickImageEnv):
    """The first picks are answered with the picture, or with words where its place is odd; the last is judged."""

    num_looks = 1

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        """An observation to each of the first `num_looks` picks that are in range."""
        index = turns[-1].arguments["index"]
        if len(turns) > self.num_looks or index not in range(episode.num_candidates):
            return self.judged(episode, turns)
        text = f"Image {index}, once more."
        return Observation(text, (episode.images[index],)) if index % 2 == 0 else Observation(text)

    def judged(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        """As PickImageEnv judges its only turn."""
        return super().respond(episode, turns[-1:])
