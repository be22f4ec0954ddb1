"""PickImageEnv: the question of an episode, and the judgement of an answer.

fleet/episodes.py says what an Episode may hold, and reward.py turns verdicts into training rewards. Touches no tensor.
"""

import json
import random
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

from fleet.episodes import Episode, EpisodeSource, ImageSource, Message
from utils.image_folders import LabelledImage, list_folder, require_distinct_labels
from utils.tool_calls import CALL_CLOSE, CALL_OPEN, ParseStatus, parse_tool_call_str
from utils.user_files import load_user_file

Item = TypeVar("Item")

# the parts of a task, for those who write one
__all__ = [
    "Episode", "EpisodeSource", "ImageSource", "Judgement", "Message", "Outcome", "ParseStatus", "PickImageEnv",
    "judge", "load_environment_class", "sample_distinct", "system_text",
]  # fmt: skip

TOOL_NAME = "pick_image"
TOOL_SCHEMA = {
    "name": TOOL_NAME,
    "description": "Pick one of the images shown.",
    "parameters": {"type": "object", "properties": {"index": {"type": "integer"}}, "required": ["index"]},
}


class Outcome(StrEnum):
    """The outcomes of an answer."""

    CORRECT = "correct"
    WRONG_INDEX = "wrong_index"  # a valid call that picks another candidate
    INDEX_OUT_OF_RANGE = "index_out_of_range"  # a well-formed call that picks no candidate
    UNPARSABLE = "unparsable"  # not exactly one well-formed call


@dataclass(frozen=True)
class Judgement:
    """The verdict on one answer. `index` is what was picked, None if the answer does not parse."""

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


def judge(text: str, correct_index: int, num_candidates: int, *, allow_reasoning: bool = False) -> Judgement:
    """The verdict on a completion. No other function decides what is right.

    text: a whole completion without its end-of-turn token. A wrong answer is a verdict, never an exception.

    >>> judge('<tool_call>{"name": "pick_image", "arguments": {"index": 3}}</tool_call>', 0, 4).outcome.value
    'wrong_index'
    """
    parsed = parse_tool_call_str(text, TOOL_NAME, allow_reasoning=allow_reasoning)
    if parsed.index is None:
        outcome = Outcome.UNPARSABLE
    elif not 0 <= parsed.index < num_candidates:
        outcome = Outcome.INDEX_OUT_OF_RANGE
    else:
        outcome = Outcome.CORRECT if parsed.index == correct_index else Outcome.WRONG_INDEX
    return Judgement(outcome, parsed.status, parsed.index)


class PickImageEnv:
    """Pick the right image out of N by one tool call. One step an episode; Gymnasium's `reset`/`step`.

    | part        | what it is                                                                                    |
    |-------------|-----------------------------------------------------------------------------------------------|
    | observation | {"images": N paths, distinct pictures; "messages": chat messages with N image placeholders}    |
    | action      | str: one `<tool_call>` of `pick_image` with an integer `index`, 0 <= index < N                |
    | reward      | 1.0 if the index is the correct one, else 0.0 (training weighs components: see reward.py)      |
    | terminated  | True after the first step                                                                     |
    | truncated   | always False                                                                                  |
    | info        | reset: "episode"; step: "outcome", "parse_status", "index", "correct_index"                   |

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
        self._reset_seed, self._next_index = seed, 0
        self._current: Episode | None = None

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
        if self.fixed_correct_index is None:
            require_distinct_labels(images)
        if len(images) < num_shown:
            raise ValueError(
                f"data folder {self.data_root} has {len(images)} images, but candidates_per_episode={num_shown} "
                "distinct ones are shown; add images or lower --candidates_per_episode"
            )
        if self.fixed_correct_index is None and len(self.paths_by_label) < num_shown:
            raise ValueError(
                f"data folder {self.data_root} has {len(self.paths_by_label)} different labels "
                f"({sorted(self.paths_by_label)[:6]}), but with --fixed_correct_index none each of the "
                f"candidates_per_episode={num_shown} images needs its own; "
                "add classes, or lower --candidates_per_episode"
            )

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

    def with_messages(self, episode: Episode) -> Episode:
        """The episode with its chat messages filled in."""
        return replace(episode, messages=tuple(self.prompt_messages(episode)))

    def prompt_messages(self, episode: Episode) -> list[Message]:
        """The chat messages that ask for the episode's target: numbered image placeholders, then the instruction."""
        instruction = self.instruction(episode)
        return pick_image_messages(episode.num_candidates, instruction, allow_reasoning=self.allow_reasoning)

    def instruction(self, episode: Episode) -> str:
        """The sentence that says which image to pick; environments of your own override it."""
        return f"Pick {'the correct image' if episode.target is None else f'the {episode.target}'}."

    def reset(self, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The next episode's (observation, info); with `seed`, the first episode of that seed."""
        if seed is not None:
            self._reset_seed, self._next_index = seed, 0
        self._current = self.draw_episode(self._reset_seed, self._next_index)
        self._next_index += 1
        observation = {"images": self._current.images, "messages": list(self._current.messages)}
        return observation, {"episode": self._current}

    def step(self, action: str) -> tuple[None, float, bool, bool, dict[str, Any]]:
        """(None, reward, True, False, info) of answering with the text `action`. Raises RuntimeError before `reset`."""
        if self._current is None:
            raise RuntimeError("step() without an episode: each has one step; call reset() first")
        episode, self._current = self._current, None
        judgement = judge(action, episode.correct_index, episode.num_candidates, allow_reasoning=self.allow_reasoning)
        info = {**asdict(judgement), "correct_index": episode.correct_index}
        return None, float(judgement.is_right), True, False, info


def pick_image_messages(num_images: int, instruction: str, *, allow_reasoning: bool = False) -> list[Message]:
    """The chat messages that ask for one of `num_images` pictures: numbered placeholders, then the instruction."""
    content: list[Message] = []
    for index in range(num_images):
        content += [{"type": "text", "text": f"Image {index}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    content.append({"type": "text", "text": f"{instruction} The index is from 0 to {num_images - 1}."})
    return [
        {"role": "system", "content": [{"type": "text", "text": system_text(allow_reasoning)}]},
        {"role": "user", "content": content},
    ]


def load_environment_class(spec: str) -> type:
    """The class that `path/to/file.py:ClassName` names. Runs that file. Raises ValueError if training cannot use it."""
    module, class_name = load_user_file(spec, "env", "path/to/file.py:ClassName")
    env_class = getattr(module, class_name, None)
    missing = [name for name in ("episode", "prompt_messages") if not callable(getattr(env_class, name, None))]
    if not isinstance(env_class, type) or missing:
        found = sorted(name for name, value in vars(module).items() if isinstance(value, type))
        raise ValueError(
            f"env={spec!r}: the file has no class {class_name} with methods episode and prompt_messages; it has {found}"
        )
    return env_class


@lru_cache
def system_text(allow_reasoning: bool = False) -> str:
    """The tool's schema and the form of a call, for a system message. allow_reasoning: asks for text before it."""
    strict = "Reply with exactly one call and nothing else, in this form:"
    lenient = "Think first if it helps, then end your reply with exactly one call, in this form:"
    rule = lenient if allow_reasoning else strict
    form = f'{CALL_OPEN}\n{{"name": "{TOOL_NAME}", "arguments": {{"index": NUMBER}}}}\n{CALL_CLOSE}'
    return f"You have one tool:\n{json.dumps(TOOL_SCHEMA)}\n{rule}\n{form}"


def sample_distinct(population: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    """`count` different items in random order, from `rng.random()` alone, whose stream Python guarantees to keep."""
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen.setdefault(int(rng.random() * len(population)))
    return [population[position] for position in chosen]
