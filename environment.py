"""Environment: the contract of a task. PickImageEnv, its first user: pick the right image out of N.

An environment decides what is shown, which tools there are, and what a call amounts to. fleet/episodes.py and
fleet/verdicts.py check all that it gives; reward.py turns verdicts into training rewards. Touches no tensor.
"""

import random
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from fleet import controls
from fleet.controls import Control, Edited
from fleet.episodes import Episode, EpisodeSource, ImageSource, Message
from fleet.gymnasium_steps import GymnasiumSteps
from fleet.verdicts import CORRECT, VALID_CALL, Observation, Verdict
from utils import tool_calls
from utils.image_folders import LabelledImage, list_folder, require_enough
from utils.seeded_draws import sample_distinct
from utils.tool_calls import ParseStatus, ToolCall, make_call_str, parse_tool_call_str
from utils.tool_schemas import Tool
from utils.user_files import load_user_file

# the parts of a task, for those who write one
__all__ = [
    "Control", "Edited", "Environment", "Episode", "EpisodeSource", "ImageSource", "Judgement", "Message",
    "Observation", "Outcome", "ParseStatus", "PickImageEnv", "PickImageTask", "ToolCall", "Verdict", "judge",
    "load_environment_class", "pick_image_messages", "sample_distinct", "system_text",
]  # fmt: skip

TOOL_NAME = "pick_image"
TOOL_SCHEMA = tool_calls.index_tool(TOOL_NAME, "Pick one of the images shown.")


class Environment(GymnasiumSteps):
    """A task: what an episode shows and asks, the tools that answer it, and the verdict on a call.

    | to write             | what it is                                                                              |
    |----------------------|-----------------------------------------------------------------------------------------|
    | `tools`              | JSON objects of name, description and parameters (a JSON Schema of type object)          |
    | `outcomes`           | an enum (StrEnum) of the ways in which an answer can end                                 |
    | `episode(index)`     | an Episode; a pure function of the environment's seed and the index                      |
    | `instruction`        | the sentence that asks, behind the images; or `prompt_messages` for messages of your own |
    | `respond`            | a Verdict on a call that fits the schemas; pure                                          |
    | `solution`           | the gold answer: a call that earns the most                                              |

    | may be written       | what it gives                                                                           |
    |----------------------|-----------------------------------------------------------------------------------------|
    | `choices(episode)`   | the calls to choose from: figures by choice, and by default `drafts` and `chance`        |
    | `drafts(episode)`    | completions that are worth guessing: only speed depends on them                          |
    | `chance(episode)`    | the share of right answers of a policy that does not look                                |
    | `edited(...)`        | the episode changed for a control of evaluation                                          |

    Nothing else is asked of it: the prompt's form of a call, the parser, metrics, evaluation and report follow. A call
    that the parser refuses ends a rollout as `unparsable`, and `respond` does not see it. A constructor need not call
    this class's. `reset` and `step` are Gymnasium's.
    """

    tools: Sequence[Tool] = ()
    outcomes: type[StrEnum] = StrEnum
    allow_reasoning = False
    numbers_one_image = False
    seed = 0

    def episode(self, index: int) -> Episode:
        """Episode `index` (0 or greater): a pure function of the seed and `index`, the same on every machine."""
        raise NotImplementedError(f"{type(self).__name__} has no episode(index); return an Episode")

    def instruction(self, episode: Episode) -> str:
        """The sentence that asks what to do."""
        raise NotImplementedError(
            f"{type(self).__name__} has neither instruction(episode) nor prompt_messages(episode); return a sentence"
        )

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        """The answer to the last of the calls so far: the Verdict that ends the rollout, or an Observation."""
        raise NotImplementedError(f"{type(self).__name__} has no respond(episode, turns); return a Verdict")

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        """The best call after these calls; with no calls, the one to begin with."""
        raise NotImplementedError(f"{type(self).__name__} has no solution(episode, turns); return a ToolCall")

    def choices(self, episode: Episode) -> Sequence[ToolCall]:
        """All calls to choose from, in an order that stays; none where an answer is not one of a few."""
        return ()

    def drafts(self, episode: Episode) -> Sequence[str]:
        """Completions that the model may well say."""
        return [make_call_str(call) for call in self.choices(episode)]

    def chance(self, episode: Episode) -> float | None:
        """The share of right answers of a policy that does not look, from 0 to 1; None if it is unknown."""
        num_choices = len(self.choices(episode))
        return 1 / num_choices if num_choices else None

    def edited(self, episode: Episode, control: Control, call: ToolCall, rng: random.Random) -> Edited | Episode | None:
        """The episode changed for a control of evaluation; None where there is no such control.

        call: what the policy said to the episode as it is. With an Episode, a right answer to it counts as a hit; an
        Edited may name another call to count. Every environment has the control of blank pictures.
        """
        return controls.blanked(episode) if control is Control.BLANK_IMAGES else None

    def prompt_messages(self, episode: Episode) -> list[Message]:
        """The chat messages that the model reads, with one `{"type": "image"}` placeholder an image."""
        return self.messages_about(episode.num_candidates, self.instruction(episode))

    def messages_about(self, num_images: int, instruction: str) -> list[Message]:
        """The messages that show so many images and ask: the tools, the images (numbered if several), the sentence."""
        content: list[Message] = [{"type": "image"}] if num_images == 1 and not self.numbers_one_image else []
        for index in range(num_images) if not content else ():
            content += [{"type": "text", "text": f"Image {index}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
        system = tool_calls.system_text(self.tools, allow_reasoning=self.allow_reasoning)
        return [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [*content, {"type": "text", "text": instruction}]},
        ]

    def with_messages(self, episode: Episode) -> Episode:
        """The episode with its chat messages filled in."""
        return replace(episode, messages=tuple(self.prompt_messages(episode)))


class Outcome(StrEnum):
    """The outcomes of an answer that picks an image."""

    CORRECT = "correct"
    WRONG_INDEX = "wrong_index"  # a valid call that picks another candidate
    INDEX_OUT_OF_RANGE = "index_out_of_range"  # a well-formed call that picks no candidate
    UNPARSABLE = "unparsable"  # not exactly one well-formed call


@dataclass(frozen=True)
class Judgement:
    """The verdict on an answer that picks an image. `index` is what was picked, None if the answer does not parse."""

    outcome: Outcome
    parse_status: ParseStatus
    index: int | None

    @property
    def is_right(self) -> bool:
        """True for the correct outcome alone."""
        return self.outcome is Outcome.CORRECT

    @property
    def is_valid_call(self) -> bool:
        """True for a call that picks one of the candidates."""
        return self.outcome in (Outcome.CORRECT, Outcome.WRONG_INDEX)

    @property
    def components(self) -> dict[str, float]:
        """The parts of the reward, each 0 or 1."""
        return {CORRECT: float(self.is_right), VALID_CALL: float(self.is_valid_call)}


def judge(text: str, correct_index: int, num_candidates: int, *, allow_reasoning: bool = False) -> Judgement:
    """The verdict on a completion that is to pick an image. No other function decides which pick is right.

    text: a whole completion without its end-of-turn token. A wrong answer is a verdict, never an exception.

    >>> judge('<tool_call>{"name": "pick_image", "arguments": {"index": 3}}</tool_call>', 0, 4).outcome.value
    'wrong_index'
    """
    parsed = parse_tool_call_str(text, TOOL_NAME, allow_reasoning=allow_reasoning)
    if parsed.index is None:
        return Judgement(Outcome.UNPARSABLE, parsed.status, None)
    return _judged(parsed.index, correct_index, num_candidates)


def _judged(index: int, correct_index: int, num_candidates: int) -> Judgement:
    if not 0 <= index < num_candidates:
        return Judgement(Outcome.INDEX_OUT_OF_RANGE, ParseStatus.OK, index)
    return Judgement(Outcome.CORRECT if index == correct_index else Outcome.WRONG_INDEX, ParseStatus.OK, index)


class PickImageTask(Environment):
    """Everything of a task that picks one of the images, but the episodes: extend it with `episode`."""

    tools = (TOOL_SCHEMA,)
    outcomes = Outcome
    numbers_one_image = True

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        """The verdict on the picked index; a task of several turns may answer before that."""
        judged = _judged(turns[-1].arguments["index"], _correct_index(episode), episode.num_candidates)
        return Verdict(judged.outcome, judged.is_right, judged.components)

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        """The call that picks the correct index."""
        return ToolCall(TOOL_NAME, {"index": _correct_index(episode)})

    def choices(self, episode: Episode) -> Sequence[ToolCall]:
        """A pick of each image."""
        return [ToolCall(TOOL_NAME, {"index": index}) for index in range(episode.num_candidates)]

    def edited(self, episode: Episode, control: Control, call: ToolCall, rng: random.Random) -> Edited | Episode | None:
        """The pictures blank, redrawn, two of them swapped, or all in another order."""
        index = call.arguments["index"]
        if control is Control.REDRAWN_IMAGES:
            return controls.with_pictures_redrawn(episode, rng)
        if control is Control.SWAPPED_IMAGES and (swapped := controls.with_picture_swapped(episode, index, rng)):
            return Edited(swapped[0], ToolCall(TOOL_NAME, {"index": swapped[1]}))
        if control is Control.PERMUTED_ORDER and (permuted := controls.with_order_permuted(episode, index, rng)):
            return Edited(self.with_messages(permuted), call)
        return super().edited(episode, control, call, rng)

    def messages_about(self, num_images: int, instruction: str) -> list[Message]:
        """The messages that show so many images and ask for one of them."""
        return super().messages_about(num_images, f"{instruction} The index is from 0 to {num_images - 1}.")

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As Environment.step; info has `index` and `correct_index` too."""
        correct_index = None if self._current is None else self._current.correct_index
        *given, info = super().step(action)
        index = None if info["call"] is None else info["call"].arguments["index"]
        return *given, info | {"index": index, "correct_index": correct_index}


class PickImageEnv(PickImageTask):
    """Pick the right image out of N by one tool call, on a folder of images. One step an episode.

    `reset` observes {"images": N paths of distinct pictures, "messages": chat messages}; `step` takes a text, which is
    right with one call of `pick_image` that has the correct `index`, 0 <= index < N.

    `fixed_correct_index=k`: the answer is always k and the instruction names no picture. This toy proves the loop.
    `fixed_correct_index=None`: the target is drawn per episode and named ("Pick the red circle."), and the N candidates
    have N different labels, so only a model that looks can win.
    """

    def __init__(
        self,
        data_root: str | Path,
        candidates_per_episode: int = 4,
        fixed_correct_index: int | None = 0,
        seed: int = 0,
        *,
        allow_reasoning: bool = False,
    ):
        """Lists the images under `data_root` (layouts: utils.image_folders.list_folder); opens none.

        candidates_per_episode: N >= 2. fixed_correct_index: in [0, N), or None. seed: any int.
        Raises ValueError for numbers out of range or a folder with too few images; FileNotFoundError or
        NotADirectoryError if `data_root` is not a folder.
        """
        if candidates_per_episode < 2:
            raise ValueError(
                f"candidates_per_episode={candidates_per_episode}, but there is nothing to pick from fewer than 2; "
                "pass --candidates_per_episode 4"
            )
        if fixed_correct_index is not None and not 0 <= fixed_correct_index < candidates_per_episode:
            raise ValueError(
                f"fixed_correct_index={fixed_correct_index}, but with candidates_per_episode={candidates_per_episode} "
                f"an index is at least 0 and at most {candidates_per_episode - 1}; correct one of the two, or pass "
                "--fixed_correct_index none to draw the target"
            )
        self.candidates_per_episode = candidates_per_episode
        self.fixed_correct_index = fixed_correct_index
        self.seed, self.allow_reasoning, self.data_root = seed, allow_reasoning, data_root
        folder = list_folder(data_root)
        self.folder_notes = folder.notes
        self._draw_from(folder.images)

    def without_images(self, paths: Collection[Path]) -> Self:
        """This environment on the rest of its images. Raises ValueError if too few are left.

        Override this if your environment derives more than episodes from `images`.
        """
        narrowed, left_out = copy(self), set(paths)
        narrowed._draw_from(tuple(image for image in self.images if image.path not in left_out))
        return narrowed

    def with_images(self, names: Collection[str]) -> Self:
        """This environment as it was when its folder still held these images. names: paths within the folder."""
        widened = copy(self)
        widened._draw_from(list_folder(self.data_root, gone=names).images)
        return widened

    def _draw_from(self, images: tuple[LabelledImage, ...]) -> None:
        self.images, num_shown = images, self.candidates_per_episode
        self.paths_by_label: dict[str, list[Path]] = {}
        for image in images:
            self.paths_by_label.setdefault(image.label, []).append(image.path)
        require_enough(images, num_shown, self.data_root, are_named=self.fixed_correct_index is None)

    def episode(self, index: int) -> Episode:
        """Episode `index` (0 or greater): a pure function of (seed, index), the same on every machine."""
        return self.draw_episode(self.seed, index)

    def draw_episode(self, seed: int, index: int) -> Episode:
        """Episode `index` of any seed; environments of your own override this and keep it a pure function."""
        if index < 0:
            raise ValueError(f"episode index {index} is negative; episodes are numbered from 0")
        rng = random.Random(f"fleet/{seed}/{index}")
        if self.fixed_correct_index is None:
            labels = sample_distinct(sorted(self.paths_by_label), self.candidates_per_episode, rng)
            paths = [sample_distinct(self.paths_by_label[label], 1, rng)[0] for label in labels]
            correct_index = int(rng.random() * self.candidates_per_episode)
        else:
            images = sample_distinct(self.images, self.candidates_per_episode, rng)
            labels, paths = [image.label for image in images], [image.path for image in images]
            correct_index = self.fixed_correct_index
        target = labels[correct_index] if self.fixed_correct_index is None else None
        return self.with_messages(Episode(tuple(paths), (), correct_index, tuple(labels), target, seed))

    def instruction(self, episode: Episode) -> str:
        """The sentence that says which image to pick; environments of your own override it."""
        return f"Pick {'the correct image' if episode.target is None else f'the {episode.target}'}."


def pick_image_messages(num_images: int, instruction: str, *, allow_reasoning: bool = False) -> list[Message]:
    """The chat messages that ask for one of `num_images` pictures: numbered placeholders, then the instruction."""
    task = PickImageTask()
    task.allow_reasoning = allow_reasoning
    return task.messages_about(num_images, instruction)


def system_text(allow_reasoning: bool = False) -> str:
    """The tool that picks an image and the form of a call, for a system message."""
    return tool_calls.system_text([TOOL_SCHEMA], allow_reasoning=allow_reasoning)


def load_environment_class(spec: str) -> type[Any]:
    """The class that `path/to/file.py:ClassName` names. Runs that file. Raises ValueError if training cannot use it.

    A class that extends no Environment, and has `episode` and `prompt_messages` alone, picks an image.
    """
    module, class_name = load_user_file(spec, "env", "path/to/file.py:ClassName")
    env_class = getattr(module, class_name, None)
    if isinstance(env_class, type) and issubclass(env_class, Environment):
        return env_class
    missing = [name for name in ("episode", "prompt_messages") if not callable(getattr(env_class, name, None))]
    if not isinstance(env_class, type) or missing:
        found = sorted(name for name, value in vars(module).items() if isinstance(value, type))
        raise ValueError(
            f"env={spec!r}: the file has no class {class_name} that extends environment.Environment, or has methods "
            f"episode and prompt_messages; it has {found}"
        )
    if hasattr(env_class, "respond") or hasattr(env_class, "tools"):
        raise ValueError(f"env={spec!r}: {class_name} has tools of its own; write class {class_name}(Environment)")
    return type(class_name, (env_class, PickImageTask), {"__module__": module.__name__})


def _correct_index(episode: Episode) -> int:
    if episode.correct_index is None:
        raise ValueError("the episode has no correct_index, but this task picks an image; give it one")
    return episode.correct_index
