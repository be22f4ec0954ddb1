"""Sound environments of every kind of answer: a place, a word, a box, a number, a set, one tool of several.

Imports no torch.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from PIL import Image, ImageDraw

from environment import Environment, Episode, ToolCall, Verdict

SIDE, CELL = 64, 16
UNIT = {"type": "number", "minimum": 0, "maximum": 1}
COORDINATE = {"type": "integer", "minimum": 0, "maximum": SIDE - 1}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": f"Calls {name}.", "parameters": parameters}


class Outcome(StrEnum):
    HIT = "hit"
    MISS = "miss"


class Click(Environment):
    """One of 16 cells of a picture is black, and is to be clicked."""

    tools: Any = (tool("click", x=COORDINATE, y=COORDINATE),)
    outcomes: Any = Outcome

    def __init__(self, seed: int = 0):
        self.seed = seed

    def episode(self, index: int) -> Any:
        rng = random.Random(f"click/{self.seed}/{index}")
        left, top = (CELL * int(rng.random() * SIDE / CELL) for _ in "xy")
        picture = Image.new("RGB", (SIDE, SIDE), tuple(rng.randbytes(3)))
        ImageDraw.Draw(picture).rectangle((left, top, left + CELL - 1, top + CELL - 1), fill="black")
        return Episode((picture,), seed=self.seed, answer={"left": left, "top": top})

    def instruction(self, episode: Episode) -> str:
        return "Click the black square."

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return verdict(is_inside(episode, turns[-1]))

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return click(*(episode.answer[edge] + CELL // 2 for edge in ("left", "top")))

    def chance(self, episode: Episode) -> Any:
        return 1 / 16


class Read(Click):
    """A picture stands for a word, which is to be written."""

    tools: Any = (tool("write", text={"type": "string"}),)
    length = 6

    def episode(self, index: int) -> Any:
        rng = random.Random(f"read/{self.seed}/{index}")
        word = "".join(rng.choice("bcdfghjk") for _ in range(self.length))
        return replace(super().episode(index), answer={"word": word})

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return verdict(turns[-1].arguments["text"] == episode.answer["word"])

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return ToolCall("write", {"text": episode.answer["word"]})

    def chance(self, episode: Episode) -> Any:
        return None


def verdict(is_right: bool, **components: float) -> Verdict:
    return Verdict(Outcome.HIT if is_right else Outcome.MISS, is_right, components)


def click(x: Any, y: Any) -> ToolCall:
    return ToolCall("click", {"x": x, "y": y})


def is_inside(episode: Episode, call: ToolCall) -> bool:
    ends = (("x", "left"), ("y", "top"))
    return all(0 <= call.arguments[name] - episode.answer[edge] < CELL for name, edge in ends)


class Box(Click):
    """The square is to be framed; a part of the reward is the overlap."""

    tools: Any = (tool("frame", box={"type": "array", "items": UNIT, "minItems": 4, "maxItems": 4}),)

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        overlap = share_in_common(turns[-1].arguments["box"], box_of(episode))
        return verdict(overlap > 0.5, correct=float(overlap > 0.5), overlap=overlap)

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return ToolCall("frame", {"box": box_of(episode)})


class Count(Click):
    """The row of the square, 0 to 3, is to be told: one of four choices."""

    tools: Any = (tool("tell", row={"type": "integer", "enum": [0, 1, 2, 3]}),)

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return verdict(turns[-1].arguments["row"] == episode.answer["top"] // CELL)

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return self.choices(episode)[episode.answer["top"] // CELL]

    def choices(self, episode: Episode) -> Any:
        return [ToolCall("tell", {"row": row}) for row in range(4)]

    def chance(self, episode: Episode) -> Any:
        return Environment.chance(self, episode)


class Tags(Click):
    """Row and column are to be named as a set of words, in any order."""

    tools: Any = (tool("tag", words={"type": "array", "items": {"type": "string"}}),)

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return verdict(sorted(turns[-1].arguments["words"]) == sorted(tags_of(episode)))

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return ToolCall("tag", {"words": tags_of(episode)})


class Several(Click):
    """The square is to be clicked in the upper half, and in the lower one to be passed over, with a reason if any."""

    tools: Any = (
        Click.tools[0],
        {
            "name": "wait",
            "description": "Does nothing.",
            "parameters": {
                "type": "object",
                "properties": {"why": {"anyOf": [{"type": "string", "maxLength": 20}, {"type": "null"}]}},
            },
        },
    )

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        is_low = episode.answer["top"] >= SIDE // 2
        return verdict(is_low if turns[-1].name == "wait" else not is_low and is_inside(episode, turns[-1]))

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return ToolCall("wait") if episode.answer["top"] >= SIDE // 2 else super().solution(episode, turns)

    def chance(self, episode: Episode) -> Any:
        return 0.5


def box_of(episode: Episode) -> list[float]:
    left, top = episode.answer["left"], episode.answer["top"]
    return [edge / SIDE for edge in (left, top, left + CELL, top + CELL)]


def tags_of(episode: Episode) -> list[str]:
    return [f"column {episode.answer['left'] // CELL}", f"row {episode.answer['top'] // CELL}"]


def share_in_common(one: Sequence[float], other: Sequence[float]) -> float:
    """The area in both boxes over the area in either."""
    both = area([max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])])
    return both / (area(one) + area(other) - both)


def area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
