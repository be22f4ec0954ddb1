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
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from environment import judge, load_environment_class
from fleet.controls import with_order_permuted
from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, checked_episode
from fleet.errors import RunStopped
from utils.child_process import command_of
from utils.images import image_digest, open_image
from utils.plain_text import require_plain_messages
from utils.tool_calls import make_tool_call_str

# The episodes that are tried, and the order in which they are asked for again.
TRIED, ASKED_AGAIN = (0, 1), (1, 0, 0, 1)
PROCESS_TIMEOUT_S = 120
FIELDS = ("images", "correct_index", "labels", "target", "seed", "messages")


def accepted_arguments(env_class: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a constructor takes by name. Raises BrokenEpisode if it needs another one."""
    parameters = inspect.signature(env_class).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return dict(given)
    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    accepted = {name: value for name, value in given.items() if kinds.get(name) in by_name}
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    wanting = [name for name in required if name not in accepted and kinds[name] != inspect.Parameter.VAR_POSITIONAL]
    if wanting:
        raise BrokenEpisode(
            f"its constructor needs {', '.join(wanting)}, but is given {', '.join(given)} by name, each if it takes "
            "it; give the other parameters defaults"
        )
    return accepted


def require_methods(env: EpisodeSource) -> None:
    """Raises BrokenEpisode unless `episode(index)` and `prompt_messages(episode)` take these arguments."""
    for method, parameter in ((env.episode, "index"), (env.prompt_messages, "episode")):
        try:
            inspect.signature(method).bind(None)
        except TypeError as error:
            name = getattr(method, "__name__", "a method")
            raise BrokenEpisode(
                f"{name}{inspect.signature(method)} cannot be called as {name}({parameter}) ({error}); correct its "
                "parameters"
            ) from error


def require_pure(env: EpisodeSource, another: EpisodeSource) -> None:
    """Raises BrokenEpisode, with the field, if an episode changes with the order of asking, or in another instance."""
    first = {index: checked_episode(env, index) for index in TRIED}
    for asked, how in ((env, "asked for again"), (another, "asked of another instance, built alike")):
        for index in ASKED_AGAIN:
            _require_same(index, first[index], checked_episode(asked, index), how)


def require_same_in_another_process(env: EpisodeSource, spec: str, arguments: Mapping[str, Any]) -> None:
    """Raises BrokenEpisode, with the field, if a process with other hashes of text draws other first episodes.

    spec, arguments: what `env` was made from. A process that fails or takes two minutes is ignored: the environment may
    hold something that one process alone can have.
    """
    other_hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    try:
        said = subprocess.run(
            command_of("fleet.own_code.environment_trial", json.dumps([spec, dict(arguments)])),
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


def _require_same(index: int, first: Episode, now: Episode, how: str) -> None:
    for field in FIELDS:
        before, after = _comparable(getattr(first, field)), _comparable(getattr(now, field))
        if before != after:
            differing = [pair for pair in zip_longest(before, after) if pair[0] != pair[1]][0]
            shown = [" ".join(repr(value).split())[-60:] for value in differing]
            raise BrokenEpisode(
                f"episode {index} changed when {how}: its {field} had {shown[0]}, then {shown[1]}; derive all "
                'randomness from the seed and the index, as random.Random(f"{seed}/{index}")'
            )


def _comparable(value: Any) -> Sequence[Any]:
    """The entries of a field, equal for equal pictures, paths and texts."""
    entries = value if isinstance(value, tuple) else (value,)
    return [image_digest(entry).hex() if isinstance(entry, Image.Image) else entry for entry in entries]


def require_usable(env: EpisodeSource, max_pixels: int | None, literals: Collection[str]) -> None:
    """Raises BrokenEpisode unless the first episodes can be shown, answered, judged, recorded and reordered.

    max_pixels: budget of an image. Raises BadImage or OSError for one that does not open and is not in `env.images`.
    literals: the texts of tokens. Raises NotPlainText for a message that holds one.
    """
    listed = {getattr(image, "path", None) for image in getattr(env, "images", None) or ()}
    for index in TRIED:
        episode = checked_episode(env, index)
        for image in episode.images:
            if isinstance(image, Image.Image) or image not in listed:
                open_image(image, max_pixels)
        right, wrong = episode.correct_index, episode.correct_index + 1
        first, second = (judge(make_tool_call_str(call), right, episode.num_candidates) for call in (right, wrong))
        if not first.is_right or second.is_right:
            raise BrokenEpisode(
                f"episode {index}: the calls {right} and {wrong} are judged {first.outcome} and {second.outcome}; "
                "leave num_candidates of Episode as it is"
            )
        # as rollouts.jsonl records it
        json.dumps([episode.labels, episode.target, episode.messages])
        try:
            with_order_permuted(env, episode, right, random.Random(index))
        except RunStopped as error:
            raise BrokenEpisode(str(error)) from error
        require_plain_messages(episode.messages, f"episode {index}", literals)


def main() -> None:
    """Prints the digests of the first episodes for the process that started this one."""
    spec, arguments = json.loads(sys.argv[1])
    env_class = load_environment_class(spec)
    print(f"\n{json.dumps(first_digests(env_class(**accepted_arguments(env_class, arguments))))}")
