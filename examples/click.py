"""An environment with a tool of its own: click the shape that is named, on a canvas with several.

    accelerate launch training.py --env examples/click.py:ClickEnv --config examples/click.yaml

A click is right inside the box of the named shape. Chance is that of a click on the middle of any cell of the canvas.
"""

import random
from collections.abc import Sequence
from enum import StrEnum

from PIL import Image, ImageDraw

from environment import Control, Edited, Environment, Episode, ToolCall, Verdict

SIDE_PX, CELL_PX = 56, 28
COLOURS = {"red": "#de3638", "green": "#2e9e52", "blue": "#2c68de", "yellow": "#fccb2c"}
PIXEL = {"type": "integer"}


class Outcome(StrEnum):
    """The ways in which an answer can end."""

    INSIDE = "inside"
    OTHER_SHAPE = "other_shape"
    BACKGROUND = "background"


class ClickEnv(Environment):
    """A canvas of `num_shapes` circles of different colours, and the tool `click`."""

    outcomes = Outcome
    tools = (
        {
            "name": "click",
            "description": "Click a pixel of the picture: x from the left, y from the top.",
            "parameters": {"type": "object", "properties": {"x": PIXEL, "y": PIXEL}, "required": ["x", "y"]},
        },
    )

    def __init__(self, seed: int = 0, num_shapes: int = 2, named: str | None = None):
        """seed: of all episodes. num_shapes: from 2 to 4. named: the colour that is always asked for; None draws it."""
        if not 2 <= num_shapes <= len(COLOURS) or named not in (None, *COLOURS):
            raise ValueError(f"{num_shapes=}, {named=}, but wanted 2 to 4, and None or one of {', '.join(COLOURS)}")
        self.seed, self.num_shapes, self.named = seed, num_shapes, named

    def episode(self, index: int) -> Episode:
        """Episode `index`: all that is random in it comes from a generator of (seed, index) alone."""
        rng = random.Random(f"click/{self.seed}/{index}")
        target, boxes = self.named or rng.choice(list(COLOURS)), {}
        names = [target, *rng.sample([name for name in COLOURS if name != target], self.num_shapes - 1)]
        for name, cell in zip(names, rng.sample(range(4), self.num_shapes), strict=True):
            x, y = (CELL_PX * place + CELL_PX // 2 for place in divmod(cell, 2))
            radius = rng.randint(8, 12)
            boxes[name] = [x - radius, y - radius, x + radius, y + radius]
        answer = {"boxes": boxes, "paper": rng.randint(225, 255)}
        return Episode(images=(draw(answer),), target=target, seed=self.seed, answer=answer)

    def instruction(self, episode: Episode) -> str:
        """The question."""
        return f"Click the {episode.target} circle."

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Verdict:
        """Right inside the named shape's box."""
        x, y = turns[-1].arguments["x"], turns[-1].arguments["y"]
        hit = [name for name, (x0, y0, x1, y1) in episode.answer["boxes"].items() if x0 <= x <= x1 and y0 <= y <= y1]
        if hit == [episode.target]:
            return Verdict(Outcome.INSIDE, is_right=True)
        return Verdict(Outcome.OTHER_SHAPE if hit else Outcome.BACKGROUND, is_right=False)

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        """The middle of the named shape's box."""
        x0, y0, x1, y1 = episode.answer["boxes"][episode.target]
        return ToolCall("click", {"x": (x0 + x1) // 2, "y": (y0 + y1) // 2})

    def chance(self, episode: Episode) -> float:
        """That of a click on the middle of any cell."""
        return 1 / 4

    def edited(self, episode: Episode, control: Control, call: ToolCall, rng: random.Random) -> Edited | Episode | None:
        """Swapped: the named shape and another trade places, and the policy is to follow."""
        if control is not Control.SWAPPED_IMAGES:
            return super().edited(episode, control, call, rng)
        boxes, other = episode.answer["boxes"], list(episode.answer["boxes"])[1]
        swapped = {**boxes, episode.target: boxes[other], other: boxes[episode.target]}
        answer = {**episode.answer, "boxes": swapped}
        return self.with_messages(Episode((draw(answer),), target=episode.target, seed=episode.seed, answer=answer))


def draw(answer: dict) -> Image.Image:
    """The canvas: a circle of each colour in its box."""
    canvas = Image.new("RGB", (SIDE_PX, SIDE_PX), (answer["paper"],) * 3)
    for name, box in answer["boxes"].items():
        ImageDraw.Draw(canvas).ellipse(box, fill=COLOURS[name])
    return canvas
