"""An environment with a tool of its own: count the dots in a picture, with one integer as the answer.

    accelerate launch training.py --env examples/counting.py:CountingEnv --config examples/counting.yaml

Chance is 1 in `most_dots`. Before, the toy is taught the form of the call, from answers to other pictures, and to see.
"""

import random
from collections.abc import Sequence
from enum import StrEnum

from PIL import Image, ImageDraw

from environment import Environment, Episode, ToolCall, Verdict

SIDE_PX = 56
MOST_CELLS = 4  # of a grid of two by two


class Outcome(StrEnum):
    """The ways in which an answer can end."""

    EXACT = "exact"
    OFF_BY_ONE = "off_by_one"
    FAR_OFF = "far_off"


class CountingEnv(Environment):
    """Pictures of 1 to `most_dots` black dots, and the tool `count`."""

    tools = (
        {
            "name": "count",
            "description": "Say how many dots the picture shows.",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    )
    outcomes = Outcome

    def __init__(self, seed: int = 0, most_dots: int = MOST_CELLS):
        """seed: of all episodes. most_dots: from 2 to 4."""
        if not 2 <= most_dots <= MOST_CELLS:
            raise ValueError(f"most_dots={most_dots}, but wanted 2 to {MOST_CELLS}; correct --env_args")
        self.seed, self.most_dots = seed, most_dots

    def episode(self, index: int) -> Episode:
        """Episode `index`: all that is random in it comes from a generator of (seed, index) alone."""
        rng = random.Random(f"counting/{self.seed}/{index}")
        count = rng.randint(1, self.most_dots)
        return Episode(images=(draw_dots(count, rng),), seed=self.seed, answer={"count": count})

    def instruction(self, episode: Episode) -> str:
        """The question."""
        return "Count the dots."

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Verdict:
        """Right if the count is exact; a count off by one is told apart from one that is far off."""
        error = abs(turns[-1].arguments["n"] - episode.answer["count"])
        outcome = {0: Outcome.EXACT, 1: Outcome.OFF_BY_ONE}.get(error, Outcome.FAR_OFF)
        return Verdict(outcome, is_right=error == 0)

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        """The gold answer."""
        return ToolCall("count", {"n": episode.answer["count"]})

    def choices(self, episode: Episode) -> list[ToolCall]:
        """Every count that a picture may show."""
        return [ToolCall("count", {"n": count}) for count in range(1, self.most_dots + 1)]


def draw_dots(count: int, rng: random.Random) -> Image.Image:
    """A picture of `count` dots of slightly different sizes, each in a cell of its own, on paper of some shade."""
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), (rng.randint(225, 255),) * 3)
    draw, cell = ImageDraw.Draw(picture), SIDE_PX // 2
    for place in rng.sample(range(MOST_CELLS), count):
        x, y = place % 2 * cell + cell / 2, place // 2 * cell + cell / 2
        radius = rng.randint(9, 12)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="black")
    return picture
