"""Sound environments broken in every way: the table of mistakes that a check must find.

Imports no torch. An entry changes a few attributes of a sound class, so that one thing is wrong with it.
"""

import itertools
import random
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from environment import Control, Edited, Environment, Episode, Observation, ToolCall, Verdict
from fleet.controls import blanked
from fleet.own_code.findings import Kind
from tests.own_code.sound_environments import CELL, SIDE, Click, Read, click, is_inside, tool, verdict

COUNTER = itertools.count()


@dataclass(frozen=True)
class Broken:
    """A sound class with attributes of its own. also: kinds that cannot but follow. words: of the message."""

    kind: Kind
    words: str
    changed: dict[str, Any]
    base: type[Click] = Click
    also: frozenset[Kind] = field(default_factory=frozenset)

    @property
    def num_pairs(self) -> int:
        """As few as do: a share takes many to be improbable."""
        return 256 if self.kind in (Kind.CHANCE_EXCEEDED, Kind.CHANCE_MISSED) else 16

    def make(self) -> type[Any]:
        return type("Mine", (self.base,), self.changed)


def fields(make: Any) -> dict[str, Any]:
    """An `episode` whose episodes have other fields. make: them, from the environment, the index and the episode."""
    return {"episode": lambda self, index: replace(Click.episode(self, index), **make(self, index))}


def fails(*_: Any) -> Any:
    raise KeyError("table")


async def waits(*_: Any) -> Any:
    return None


def on(index_is: Any, kept: Any = Click.episode) -> Any:
    return lambda self, index: fails() if index_is(index) else kept(self, index)


def noting(method: str) -> Any:
    """The method, which also writes into the episode it is given."""

    def changing(self: Any, episode: Episode, *others: Any) -> Any:
        answer: Any = episode.answer
        answer["seen"] = next(COUNTER)
        return getattr(Click, method)(self, episode, *others)

    return changing


def painting(self: Any, episode: Episode, control: Control, call: ToolCall, rng: random.Random) -> Any:
    episode.images[0].putpixel((0, 0), (next(COUNTER) % 255, 1, 2))  # type: ignore[union-attr]
    return None


def on_blank(make: Any) -> dict[str, Any]:
    return {"edited": lambda self, episode, control, call, rng: (
        make(self, episode) if control is Control.BLANK_IMAGES else None)}  # fmt: skip


def toggling(self: Any, episode: Episode, turns: Any) -> Verdict:
    return verdict(next(self.__dict__.setdefault("count", itertools.count())) % 2 == 0)


def with_schema(**schema: Any) -> dict[str, Any]:
    changed = deepcopy(Click.tools[0])
    changed["parameters"] |= schema
    return {"tools": [changed]}


PLAIN_PROMPT = {"prompt_messages": lambda self, episode: [{"role": "user", "content": ["click it", {"type": "image"}]}]}
ANSWERS = {"respond": lambda self, e, turns: verdict(True), "chance": lambda self, e: None}
END = "<|im_end|>"

# fmt: off
BROKEN = [
    Broken(Kind.CONSTRUCTOR, "its constructor needs table", {"__init__": lambda self, table: None}),
    Broken(Kind.CONSTRUCTOR, "KeyError: 'table' (in the constructor()", {"__init__": fails}),
    Broken(Kind.SIGNATURE, "cannot be called as respond(episode, turns)", {"respond": lambda self, episode: None}),
    Broken(Kind.SIGNATURE, "cannot be called as edited(episode, control", {"edited": lambda self, episode: None}),
    Broken(Kind.NO_TOOLS, "tools is empty", {"tools": []}),
    Broken(Kind.TOOL_UNFIT, "click: parameters.properties.x has no type", with_schema(properties={"x": {}})),
    Broken(Kind.TOOL_UNFIT, "additionalProperties, which lets", with_schema(additionalProperties=True)),
    Broken(Kind.TOOL_UNFIT, "tools[0] is named 'a b'", {"tools": [tool("a b")]}),
    Broken(Kind.TOOL_UNFIT, "failed with KeyError", {"tools": property(fails)}),
    Broken(Kind.TOOL_UNFIT, "wrapped as a function", {"tools": [{"type": "function", "function": Click.tools[0]}]}),
    Broken(Kind.SCHEMA_INVALID, "'whole' is not valid", with_schema(properties={"x": {"type": "whole"}})),
    Broken(Kind.TOOLS_CHANGE, "it is shown to the model once", PLAIN_PROMPT | {
        "tools": property(lambda self: [Click.tools[0] | {"description": str(next(COUNTER))}])}),
    Broken(Kind.OUTCOMES, "outcomes is ['hit'] (list)", {"outcomes": ["hit"]}),
    Broken(Kind.OUTCOMES, "failed with KeyError", {"outcomes": property(fails)}),
    Broken(Kind.EPISODE_RAISES, "episode 7 failed with KeyError: 'table'", {"episode": on(lambda index: index == 7)}),
    Broken(Kind.EPISODE_RAISES, "episode 1000000 failed", {"episode": on(lambda index: index > 10_000)}),
    Broken(Kind.EPISODE_FIELD, "episode 0: episode() returned {} (dict)", {"episode": lambda self, index: {}}),
    Broken(Kind.EPISODE_FIELD, "episode 0: images is empty", fields(lambda self, index: {"images": ()})),
    Broken(Kind.EPISODE_FIELD, "an array of float64 of shape (4, 4, 3)", fields(
        lambda self, index: {"images": [np.zeros((4, 4, 3))]})),
    Broken(Kind.EPISODE_IMPURE, "its target had", fields(lambda self, index: {"target": str(next(COUNTER))})),
    Broken(Kind.OTHER_INSTANCE, "asked of another instance", fields(lambda self, index: {"target": str(id(self))})),
    Broken(Kind.EPISODE_CHANGED, "when given to respond: its answer", {"respond": noting("respond")}),
    Broken(Kind.EPISODE_CHANGED, "when given to solution: its answer", {"solution": noting("solution")}),
    Broken(Kind.EPISODE_CHANGED, "when given to choices, drafts or chance", {"chance": noting("chance")}),
    Broken(Kind.EPISODE_CHANGED, "when given to edited: its images", {"edited": painting}),
    Broken(Kind.BAD_IMAGE, "400x1 pixels", fields(
        lambda self, index: {"images": [Image.new("L", (400, 1), index % 256)]})),
    Broken(Kind.BAD_IMAGE, "episode 0: image given by the environment has values below 0", fields(
        lambda self, index: {"images": [Image.new("F", (8, 8), -1.0 - index)]})),
    Broken(Kind.PROMPT_RAISES, "in prompt_messages()", {"prompt_messages": fails}),
    Broken(Kind.PROMPT_RAISES, "in prompt_messages()", {"instruction": fails}),
    Broken(Kind.MESSAGES, "1 images and 0 image placeholders", {
        "prompt_messages": lambda self, episode: [{"role": "user", "content": "click"}]}),
    Broken(Kind.MESSAGES, "has role 'bot'", {
        "prompt_messages": lambda self, episode: [{"role": "bot", "content": ""}]}),
    Broken(Kind.LITERAL, "episode 0: target holds <|im_end|>", fields(lambda self, index: {"target": END})),
    Broken(Kind.LITERAL, "episode 0: labels[0] holds <|im_end|>", fields(lambda self, index: {"labels": [END]})),
    Broken(Kind.LITERAL, "the user message holds <|im_end|>", {"instruction": lambda self, episode: END}),
    Broken(Kind.LITERAL, "tool click holds <|im_end|>", {"tools": [Click.tools[0] | {"description": END}]}),
    Broken(Kind.LITERAL, "episode 0: the gold answer: the call of write holds <|im_end|>", {
        "solution": lambda self, e, turns: ToolCall("write", {"text": f"{e.answer['word']}{END}"}),
        "respond": lambda self, e, turns: verdict(turns[-1].arguments["text"] == f"{e.answer['word']}{END}")}, Read),
    Broken(Kind.SOLUTION_RAISES, "the gold answer failed with KeyError", {"solution": fails}),
    Broken(Kind.SOLUTION_RAISES, "has no solution(episode, turns)", {"solution": Environment.solution}),
    Broken(Kind.SOLUTION_UNFIT, "it is None (NoneType)", {"solution": lambda self, e, turns: None}),
    Broken(Kind.SOLUTION_UNFIT, "it calls 'press'", {"solution": lambda self, e, turns: ToolCall("press")}),
    Broken(Kind.SOLUTION_UNFIT, "64 is greater than the maximum", {"solution": lambda self, e, turns: click(64, 0)}),
    Broken(Kind.SOLUTION_UNFIT, "not plain JSON", {"solution": lambda self, e, turns: click(np.int64(1), 0)}),
    Broken(Kind.SOLUTION_TEXT, "its text is refused as too_long", {"length": 5000}, Read),
    Broken(Kind.SOLUTION_IMPURE, "and another call when asked again", {
        "solution": lambda self, e, turns: click(e.answer["left"] + next(COUNTER) % CELL, e.answer["top"])}),
    Broken(Kind.RESPOND_RAISES, "ZeroDivisionError", {
        "respond": lambda self, e, turns: verdict(is_inside(e, turns[-1]) and 1 / turns[-1].arguments["x"] > 0)
        if turns[-1].arguments["x"] else 1 / 0}),
    Broken(Kind.NO_VERDICT, "returned True (bool), but wanted a Verdict", {"respond": lambda self, e, turns: True}),
    Broken(Kind.NO_VERDICT, "respond() is async", {"respond": waits}),
    Broken(Kind.OBSERVATION, "there is one turn", {"respond": lambda self, e, turns: Observation("go on")}),
    Broken(Kind.UNKNOWN_OUTCOME, "'near' (str), but wanted one of hit, miss", {
        "respond": lambda self, e, turns: Verdict("near", is_right=False)}),
    Broken(Kind.VERDICT_VALUE, "component correct is nan", {
        "respond": lambda self, e, turns: verdict(is_inside(e, turns[-1]), correct=float("nan"))}),
    Broken(Kind.VERDICT_VALUE, "its is_right is 1 (int)", {
        "respond": lambda self, e, turns: Verdict("hit", is_right=1)}),  # type: ignore[arg-type]
    Broken(Kind.RESPOND_IMPURE, "derive it from the episode and the call alone", {"respond": toggling}),
    Broken(Kind.GOLD_WRONG, "is judged miss, which is not right", {
        "solution": lambda self, e, turns: click((e.answer["left"] + CELL) % SIDE, e.answer["top"])}),
    Broken(Kind.GOLD_NOT_BEST, "earns 1, but", {"respond": lambda self, e, turns: verdict(
        inside := is_inside(e, turns[-1]), correct=0.95 * inside, corner=2.0 * (turns[-1] == click(0, 0)) + 0.0975
        * inside)}),
    Broken(Kind.GOLD_EARNS_NOTHING, "its gold answer earns 0, no more", {
        "respond": lambda self, e, turns: verdict(is_inside(e, turns[-1]), correct=0.0)}),
    Broken(Kind.OUTCOME_UNCLEAR, "ends as hit and is wrong, where another was not", {
        "respond": lambda self, e, turns: Verdict("hit", is_inside(e, turns[-1]))}),
    Broken(Kind.EDITED, "changed when edited again for blank_images: its target", on_blank(
        lambda self, episode: replace(blanked(episode), target=str(next(COUNTER))))),
    Broken(Kind.NEGATIVE_REWARD, "earns -0.5, less than the 0", {"respond": lambda self, e, turns: verdict(
        inside := is_inside(e, turns[-1]), points=1.0 if inside else -0.5)}),
    Broken(Kind.ALL_RIGHT, "so nothing can be learnt", ANSWERS),
    Broken(Kind.BLIND_CALL, '"arguments": {"x": 0, "y": 0}} is right in each of 18 episodes', {
        "respond": lambda self, e, turns: verdict(is_inside(e, turns[-1]) or turns[-1] == click(0, 0))}),
    Broken(Kind.CHANCE, "chance() returned 2 (int)", {"chance": lambda self, episode: 2}),
    Broken(Kind.CHANCE, "failed with KeyError: 'table' (in chance()", {"chance": fails}),
    Broken(Kind.CHANCE_EXCEEDED, "chance() says 0.1% on average", {"chance": lambda self, episode: 0.001}),
    Broken(Kind.CHANCE_MISSED, "chance() says 90.0% on average", {"chance": lambda self, episode: 0.9}),
    Broken(Kind.CHOICES, "it is 3 (int), but wanted a call", {"choices": lambda self, episode: [3]},
           also=frozenset({Kind.DRAFTS})),
    Broken(Kind.CHOICES_WITHOUT_SOLUTION, "is not among its choices", {
        "choices": lambda self, episode: [click(0, 0), click(63, 63)]}),
    Broken(Kind.CHOICES_ALIKE, "two of its choices are named", {
        "choices": lambda self, episode: [self.solution(episode, ())] * 2}),
    Broken(Kind.DRAFTS, "is refused as no_call", {"drafts": lambda self, episode: ["click there"]}),
    Broken(Kind.EDITED, "edited() returned 3 (int)", on_blank(lambda self, episode: 3)),
    Broken(Kind.EDITED, "failed with KeyError", on_blank(fails)),
    Broken(Kind.EDITED, "wanted a call that the schemas take", on_blank(
        lambda self, episode: Edited(blanked(episode), click(99, 0)))),
    Broken(Kind.BLANK_SHOWS, "still shows something", on_blank(lambda self, episode: episode)),
    Broken(Kind.EXPLOIT, "hedge of several answers (text)", {"respond": lambda self, e, turns: verdict(
        e.answer["word"] in turns[-1].arguments["text"])}, Read),
    Broken(Kind.EXPLOIT, "claim '' (text)", {"respond": lambda self, e, turns: verdict(
        turns[-1].arguments["text"] in e.answer["word"])}, Read, frozenset({Kind.BLIND_CALL})),
    Broken(Kind.NO_SEED, "takes no seed", {"__init__": lambda self: None}),
    Broken(Kind.SEED_IGNORED, "are the same for another seed", {"__init__": lambda self, seed: None}),
    Broken(Kind.REPEATS, "8 of the first 64 episodes are distinct", {
        "episode": lambda self, index: Click.episode(self, index % 8), "chance": lambda self, episode: None}),
    Broken(Kind.SAME_ANSWER, 'gold answer to all of 64 episodes is {"name": "click"', fields(lambda self, index: {
        "images": [Image.new("RGB", (8, 8), (index % 255, index // 255 % 255, 9 + self.seed))],
        "answer": {"left": 16, "top": 16}})),
    Broken(Kind.LONG_CALL, "about 123 tokens, but a completion has 64", {"length": 300}, Read),
    Broken(Kind.TOOL_UNNAMED, "no message names the tool click", {"prompt_messages": lambda self, episode: [
        {"role": "user", "content": ["Choose.", {"type": "image"}]}]}),
]
# fmt: on
