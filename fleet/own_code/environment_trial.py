"""The trial of a user's own environment before a weight loads: its constructor, methods and first episodes.

Raises BrokenEpisode, and command/preflight.py names the file. Imports no torch.
"""

import hashlib
import inspect
import json
import os
import random
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from environment import load_environment_class
from fleet.controls import Control, checked_edit
from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, checked_episode
from fleet.known_answers import chance_of, choices_of, drafts_of, solutions_of
from fleet.own_code.constructor import constructor_arguments
from fleet.verdicts import Observation, Verdict, answer_to, shown_images
from utils.child_process import command_of
from utils.images import BadImage, image_digest, open_image
from utils.plain_text import NotPlainText, require_plain_messages
from utils.tool_calls import ToolCall

# The episodes that are tried, and the order in which they are asked for again.
TRIED, ASKED_AGAIN = (0, 1), (1, 0, 0, 1)
PROCESS_TIMEOUT_S = 120
DERIVE = 'derive all randomness from the seed and the index, as random.Random(f"{seed}/{index}")'
METHODS = {
    "episode": ("index",),
    "prompt_messages": ("episode",),
    "respond": ("episode", "turns"),
    "solution": ("episode", "turns"),
    "choices": ("episode",),
    "drafts": ("episode",),
    "chance": ("episode",),
    "edited": ("episode", "control", "call", "rng"),
}
FIELDS = ("images", "correct_index", "labels", "target", "seed", "answer", "messages")


def require_methods(env: EpisodeSource, methods: Mapping[str, Sequence[str]] = METHODS) -> None:
    """Raises BrokenEpisode unless each of these methods takes its arguments by place."""
    for name, parameters in methods.items():
        signature = inspect.signature(getattr(env, name))
        try:
            signature.bind(*parameters)
        except TypeError as error:
            raise BrokenEpisode(
                f"{name}{signature} cannot be called as {name}({', '.join(parameters)}) ({error}); correct its "
                "parameters"
            ) from error


def require_pure(env: EpisodeSource, another: EpisodeSource) -> None:
    """Raises BrokenEpisode, with the field, if an episode changes with the order of asking, or in another instance."""
    first = {index: comparable_fields(checked_episode(env, index)) for index in TRIED}
    for asked, how in ((env, "asked for again"), (another, "asked of another instance, built alike")):
        for index in ASKED_AGAIN:
            require_same(index, first[index], comparable_fields(checked_episode(asked, index)), how)


def require_same_in_another_process(
    env: EpisodeSource, spec: str, offered: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Raises BrokenEpisode, with the field, if a process with other hashes of text draws other first episodes.

    spec, offered, own: what `env` was made from, as constructor_arguments takes it. A process that fails or takes two
    minutes is ignored: the environment may hold something that one process alone can have.
    """
    other_hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    try:
        said = subprocess.run(
            command_of("fleet.own_code.environment_trial", json.dumps([spec, dict(offered), dict(own)])),
            env={**os.environ, "PYTHONHASHSEED": other_hashes},
            capture_output=True,
            text=True,
            check=True,
            timeout=PROCESS_TIMEOUT_S,
        ).stdout
        digests = json.loads(said.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return
    require_same_digests([first_digests(env), digests])


def require_same_digests(digests_by_process: Sequence[Mapping[str, str]]) -> None:
    """Raises BrokenEpisode, with the field, if two processes drew other first episodes."""
    for digests in digests_by_process[1:]:
        for name, digest in digests_by_process[0].items():
            if digests.get(name) != digest:
                raise BrokenEpisode(
                    f"the {name}: not the same in another process; derive all randomness from the seed and the index, "
                    'as random.Random(f"{seed}/{index}"), and depend on no rank, no hash() of a text, no order of a set'
                )


def first_digests(env: EpisodeSource) -> dict[str, str]:
    """A digest of each field of the first episodes, by its name in an error. A file counts by its name alone."""
    digests = {}
    for index in TRIED:
        episode = checked_episode(env, index)
        for field in FIELDS:
            entries = _comparable(getattr(episode, field))
            named = [entry.name if isinstance(entry, Path) else entry for entry in entries]
            digests[f"{field} of episode {index}"] = hashlib.sha256(repr(named).encode()).hexdigest()
    return digests


def require_same(
    index: int, first: Mapping[str, Sequence[Any]], now: Mapping[str, Sequence[Any]], how: str, remedy: str = DERIVE
) -> None:
    """Raises BrokenEpisode, with the field, if an episode has changed. first, now: its comparable fields."""
    for field, before in first.items():
        if before != now[field]:
            differing = [pair for pair in zip_longest(before, now[field]) if pair[0] != pair[1]][0]
            shown = [" ".join(repr(value).split())[-60:] for value in differing]
            raise BrokenEpisode(
                f"episode {index} changed when {how}: its {field} had {shown[0]}, then {shown[1]}; {remedy}"
            )


def comparable_fields(episode: Episode) -> dict[str, Sequence[Any]]:
    """The entries of each field, equal for equal pictures, paths and texts; a copy that stays as it is."""
    return {field: _comparable(getattr(episode, field)) for field in FIELDS}


def _comparable(value: Any) -> Sequence[Any]:
    entries = value if isinstance(value, tuple) else (value,)
    return [image_digest(entry).hex() if isinstance(entry, Image.Image) else deepcopy(entry) for entry in entries]


def require_usable(env: EpisodeSource, max_pixels: int | None, literals: Collection[str], max_turns: int = 1) -> None:
    """Raises BrokenEpisode unless the first episodes can be shown, answered, judged, recorded and changed.

    max_pixels: budget of an image. Raises BadImage or OSError for one that does not open and is not in `env.images`.
    literals: the texts of tokens. Raises NotPlainText for a message that holds one.
    """
    tools = json.dumps(list(env.tools))
    listed = {getattr(image, "path", None) for image in getattr(env, "images", None) or ()}
    for index in TRIED:
        episode = checked_episode(env, index)
        for image in episode.images:
            if isinstance(image, Image.Image) or image not in listed:
                open_image(image, max_pixels)
        require_plain_messages(episode.messages, f"episode {index}", literals)
        golds = _require_golds(env, episode, index, max_turns)
        for end in range(1, len(golds)):
            _require_showable(env, episode, golds[:end], max_pixels, literals, max_turns)
        # as rollouts.jsonl records it
        json.dumps([episode.labels, episode.target, episode.messages])
        rng = random.Random(index)
        for control in Control:
            checked_edit(env, episode, control, golds[-1], rng)
    if json.dumps(list(env.tools)) != tools:
        raise BrokenEpisode("tools is not the same after two episodes; it is shown to the model once: keep it as it is")


def _require_golds(env: EpisodeSource, episode: Episode, index: int, max_turns: int) -> list[ToolCall]:
    """The gold answers of the episode's turns.

    Raises BrokenEpisode unless the last is right, not every choice in its place is, and chance and drafts are sound.
    """
    golds = solutions_of(env, episode, max_turns=max_turns)
    verdict = answer_to(env, episode, golds, max_turns=max_turns)
    if not isinstance(verdict, Verdict):
        raise BrokenEpisode(
            f"episode {index}: there is no verdict after {len(golds)} gold answers, the last of them {golds[-1]}; pass "
            "a greater --max_turns, or correct solution() or respond()"
        )
    if not verdict.is_right:
        raise BrokenEpisode(
            f"episode {index}: its solution, {golds[-1]}, is judged {verdict.outcome}, which is not right; correct "
            "solution() or respond()"
        )
    chance_of(env, episode), drafts_of(env, episode)
    choices = [*env.choices(episode)] if choices_of(env, episode) else []
    others = [
        answer_to(env, episode, [*golds[:-1], call], max_turns=max_turns)
        for call in choices
        if str(call) != str(golds[-1])
    ]
    if others and all(isinstance(other, Verdict) and other.is_right for other in others):
        raise BrokenEpisode(f"episode {index}: every choice is right, so nothing can be learnt; correct respond()")
    return golds


def _require_showable(
    env: EpisodeSource,
    episode: Episode,
    calls: Sequence[ToolCall],
    max_pixels: int | None,
    literals: Collection[str],
    max_turns: int,
) -> None:
    """Raises BrokenEpisode if what a tool answers to the last of these calls cannot be shown."""
    answer = answer_to(env, episode, calls, max_turns=max_turns)
    try:
        if isinstance(answer, Observation):
            shown_images(answer, max_pixels, literals)
    except (NotPlainText, BadImage, OSError) as error:
        raise BrokenEpisode(f"the answer to {calls[-1]} cannot be shown: {error}") from error


def main() -> None:
    """Prints the digests of the first episodes for the process that started this one."""
    spec, offered, own = json.loads(sys.argv[1])
    env_class = load_environment_class(spec)
    print(f"\n{json.dumps(first_digests(env_class(**constructor_arguments(env_class, offered, own))))}")
