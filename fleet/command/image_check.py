"""The images of an environment that can be used: each process reads a share of them, and all agree on the whole.

Bad images stop the run or are left out. Imports no torch: run/data.py tells the processes of each other's shares.
"""

import hashlib
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from environment import EpisodeSource
from fleet.command.data_sets import image_root
from fleet.command.flags import TaskFlags
from fleet.errors import UsageError, refused
from fleet.model_folder.files import base_of
from utils.image_folders import LabelledImage
from utils.images import BadImage, checked_sha256
from utils.plain_text import QWEN_ADDED_TOKENS, added_token_literals, printable, problem_of_label
from utils.user_files import folder_kept

logger = logging.getLogger("fleet")

MAX_NAMED = 5  # bad images that a message lists with their reasons
SECONDS_PER_PROGRESS_LINE = 10.0


@dataclass(frozen=True)
class ImageShare:
    """The result of reading one process's share of the images.

    names_digest: hex, of the whole list, names and labels. sha256s: 32 bytes of each sound file, by its image's place
    in the list. problems: the reason against a bad one, likewise.
    """

    names_digest: str
    sha256s: Mapping[int, bytes]
    problems: Mapping[int, str]


@dataclass(frozen=True)
class RunData:
    """The images that a run draws from, the same on every process.

    data_digest: hex, of the name, label and bytes of each in order; None where the environment has no list of images.
    skipped_images: the names (relative to data_root) of those that are left out. sha256s: hex, of the bytes of each by
    its name; an image that has gone bad keeps its old one.
    """

    env: EpisodeSource
    data_digest: str | None = None
    skipped_images: tuple[str, ...] = ()
    sha256s: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """The findings of one process before it hears of others: the environment, and its share of the images.

    share: None for an environment without a list of `images`. data: of the only process of a run. episode_digests: of
    the first episodes' fields; empty where one does not open. beginning: SHA-256 by name, as the run began.
    """

    env: EpisodeSource
    share: ImageShare | None
    data: RunData | None = None
    episode_digests: Mapping[str, str] = field(default_factory=dict)
    beginning: Mapping[str, str] = field(default_factory=dict)


def find_bad_images(
    env: EpisodeSource,
    task: TaskFlags,
    model_id: str,
    launch_variables: Mapping[str, str],
    beginning: Mapping[str, str] | None = None,
) -> Findings:
    """The findings of this process, which reads every L-th image on a machine of L processes.

    launch_variables: known to be consistent. beginning: as settle's. Raises UsageError, as settle does, if it is alone.
    """
    for note in getattr(env, "folder_notes", ()):
        logger.info(f"{task.data_root}: {note}")
    is_alone = launch_variables.get("WORLD_SIZE", "1") == "1"
    share = None
    if (images := images_of(env)) is not None:
        first = 0 if is_alone else int(launch_variables.get("LOCAL_RANK", "0"))
        stride = 1 if is_alone else int(launch_variables.get("LOCAL_WORLD_SIZE", "1"))
        literals = added_token_literals(model_id) | added_token_literals(base_of(model_id))
        share = check_share(images, image_root(task), first, stride, literals)
    return Findings(env, share, settle(task, env, [share], beginning) if is_alone else None, beginning=beginning or {})


def images_of(env: EpisodeSource) -> tuple[LabelledImage, ...] | None:
    """The images that an environment draws from; None if it keeps no such list."""
    images = getattr(env, "images", None)
    if not isinstance(images, Sequence) or not all(isinstance(image, LabelledImage) for image in images):
        return None
    return tuple(images)


def check_share(
    images: Sequence[LabelledImage],
    data_root: str | Path,
    first: int,
    stride: int,
    literals: Collection[str] = QWEN_ADDED_TOKENS,
) -> ImageShare:
    """Reads and decodes every `stride`-th image from `first` on. literals: tokens' texts, which no label may hold."""
    sha256s: dict[int, bytes] = {}
    problems: dict[int, str] = {}
    next_line_s = time.monotonic() + SECONDS_PER_PROGRESS_LINE
    places = range(first, len(images), stride)
    for number, place in enumerate(places, start=1):
        if (problem := problem_of_label(images[place].label, literals)) is not None:
            problems[place] = problem
        else:
            try:
                sha256s[place] = checked_sha256(images[place].path)
            except BadImage as error:
                problems[place] = error.reason
        if time.monotonic() >= next_line_s:
            logger.info(f"checked {number:,} of {len(places):,} images")
            next_line_s += SECONDS_PER_PROGRESS_LINE
    names_digest = _digest(_line(image_name(image.path, data_root), image.label) for image in images)
    return ImageShare(names_digest, sha256s, problems)


def settle(
    task: TaskFlags,
    env: EpisodeSource,
    found: Sequence[ImageShare | None],
    beginning: Mapping[str, str] | None = None,
) -> RunData:
    """The images that the run draws from, given the shares of all processes: the same on each of them.

    found: by rank, of equal names_digest; None where the environment has no list of images. beginning: the sha256s of
    a resumed run. If bad images are skipped, one that has gone bad since is still drawn, and its episode replaced.
    Raises UsageError if bad images stop the run or leave too little, or machines hold different files.
    """
    shares = [share for share in found if share is not None]
    if not shares:
        return RunData(env)
    listing = listing_of(env, image_root(task))
    names = [name for name, _ in listing]
    problems = {place: problem for share in shares for place, problem in share.problems.items()}
    sha256s = _sha256s(names, shares, problems)
    if beginning and task.bad_images == "skip":
        gone_bad = {place: problems.pop(place) for place in sorted(problems) if names[place] in beginning}
        for place in gone_bad:
            sha256s[place] = bytes.fromhex(beginning[names[place]])
        if gone_bad:
            logger.info(f"replaced since the run began: {describe_problems(task, names, gone_bad)}\n")
    description = describe_problems(task, names, problems)
    if problems and task.bad_images == "stop":
        raise UsageError(f"{description}; replace or remove what is bad, or pass --bad_images skip to leave it out")
    skipped = tuple(names[place] for place in sorted(problems))
    with refused(UsageError, before=f"{description}; left out, "):
        narrowed = without_images(env, skipped, task)
    if problems:
        logger.info(f"left out: {description}\n")
    digest = _digest(_line(*listing[place]) + sha256s[place] for place in sorted(sha256s))
    return RunData(narrowed, digest, skipped, {names[place]: sha256s[place].hex() for place in sorted(sha256s)})


def without_images(env: EpisodeSource, names: Collection[str], task: TaskFlags) -> EpisodeSource:
    """The environment without the images of these names. Raises UsageError if it needs them."""
    left_out = set(names)
    paths = [image.path for image in images_of(env) or () if image_name(image.path, image_root(task)) in left_out]
    if not paths:
        return env
    narrow: Any = getattr(env, "without_images", None)
    if not callable(narrow):
        raise UsageError(
            f"env={task.env} has no method without_images(paths), so it cannot leave any out; add one that returns "
            "the environment without them, or replace the images"
        )
    try:
        with folder_kept():
            narrowed = narrow(paths)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        # an environment file is the user's code and may raise anything
        raise UsageError(f"env={task.env} failed with {type(error).__name__}: {error}; correct it") from error
    if not callable(getattr(narrowed, "episode", None)):
        raise UsageError(
            f"env={task.env}: its method without_images(paths) returned a {type(narrowed).__name__}, but wanted the "
            "environment without them; return a copy"
        )
    return narrowed


def image_name(path: str | Path, data_root: str | Path) -> str:
    """The name of an image on every machine: its path from the data folder on."""
    name, root = str(path), _prefix_of(data_root)
    if name.startswith(root) and "/../" not in name:
        # most by far, and there may be a million
        return name[len(root) :]
    return Path(os.path.relpath(path, data_root)).as_posix()


@lru_cache
def _prefix_of(folder: str | Path) -> str:
    return f"{Path(folder)}/"


def describe_problems(task: TaskFlags, names: Sequence[str], problems: Mapping[int, str]) -> str:
    """The number of bad images, and the first few with the reason each, in a line."""
    places = sorted(problems)
    named = "; ".join(f"{printable(names[place])} {problems[place]}" for place in places[:MAX_NAMED])
    more = f"; and {len(places) - MAX_NAMED:,} more" if len(places) > MAX_NAMED else ""
    return f"{len(places):,} of {len(names):,} images in {task.data_root} cannot be used: {named}{more}"


def first_difference(listings: Sequence[Sequence[tuple[str, str]]]) -> str:
    """The first difference between lists of (name, label), in words. listings: by rank, not all equal."""
    other = next(rank for rank, listing in enumerate(listings) if listing != listings[0])
    ours, theirs = dict(listings[0]), dict(listings[other])
    for name in sorted(ours.keys() | theirs.keys()):
        shown = printable(name)
        if name not in theirs:
            return f"{shown} is there for process 0, not for process {other}"
        if name not in ours:
            return f"{shown} is there for process {other}, not for process 0"
        if ours[name] != theirs[name]:
            return f"{shown} is labelled {ours[name]!r} for process 0, {theirs[name]!r} for process {other}"
    return f"process {other} has the same images in another order"


def listing_of(env: EpisodeSource, data_root: str | Path) -> list[tuple[str, str]]:
    """(name, label) of every image that an environment draws from, in order."""
    return [(image_name(image.path, data_root), image.label) for image in images_of(env) or ()]


def _sha256s(names: Sequence[str], shares: Sequence[ImageShare], problems: Collection[int]) -> dict[int, bytes]:
    """The digest of each sound image, by its place. Raises UsageError if two machines differ, or none read it."""
    read: dict[int, tuple[bytes, int]] = {}
    for rank, share in enumerate(shares):
        for place, sha256 in share.sha256s.items():
            first_sha256, first_rank = read.setdefault(place, (sha256, rank))
            if sha256 != first_sha256 and place not in problems:
                raise UsageError(
                    f"the machines hold different files: {printable(names[place])} is another one for process {rank} "
                    f"than for process {first_rank}; give every machine the same data folder"
                )
    sound = [place for place in range(len(names)) if place not in problems]
    if unread := [place for place in sound if place not in read]:
        raise UsageError(
            f"no process was to check {printable(names[unread[0]])}, so LOCAL_RANK or LOCAL_WORLD_SIZE is wrong on "
            "some; start with accelerate launch"
        )
    return {place: read[place][0] for place in sound}


def _digest(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    return digest.hexdigest()


def _line(*words: str) -> bytes:
    # neither names of files nor texts hold a zero; a name may hold bytes that are not text
    return b"".join(word.encode("utf-8", "surrogatepass") + b"\0" for word in words)
