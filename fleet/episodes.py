"""Episode: one prompt with its pictures and what is known of its answer, and the check of all that is given for it.

Owns the border between a user's environment and Fleet: every consumer takes its episodes from `checked_episode` and
its messages from `checked_messages`. Values of plain meaning are converted: numpy's integers, lists, arrays of pixels,
messages of plain text. Any other value is a BrokenEpisode that names it, and so is a text that holds the literal of a
model's token. Imports no torch and no numpy.
"""

import inspect
import json
import operator
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

from PIL import Image

from utils.images import BadImage
from utils.plain_text import NotPlainText, require_plain_messages, require_plain_text
from utils.tool_calls import ToolCall
from utils.user_files import folder_kept

ImageSource = Path | Image.Image
Message = dict[str, Any]
Value = TypeVar("Value")

ROLES = ("system", "user", "assistant", "tool")
CHANNELS = (1, 3, 4)  # of an array of pixels: grey, RGB, RGBA


class BrokenEpisode(ValueError):
    """An environment gave something that is no episode. One line: the episode, got, wanted, remedy."""


class EpisodeSource(Protocol):
    """What Fleet calls on an environment; environment.Environment has the contract."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def outcomes(self) -> type[StrEnum]: ...
    def episode(self, index: int) -> "Episode": ...
    def prompt_messages(self, episode: "Episode") -> list[Message]: ...
    def respond(self, episode: "Episode", turns: Sequence[ToolCall]) -> Any: ...
    def solution(self, episode: "Episode", turns: Sequence[ToolCall]) -> ToolCall: ...
    def choices(self, episode: "Episode") -> Sequence[ToolCall]: ...
    def drafts(self, episode: "Episode") -> Sequence[str]: ...
    def chance(self, episode: "Episode") -> float | None: ...
    def edited(self, episode: "Episode", control: Any, call: ToolCall, rng: Random) -> Any: ...


@dataclass(frozen=True)
class Episode:
    """One prompt: N images, the chat messages that ask about them, and what is known of the answer.

    images: N >= 1 paths or PIL images, in the order of the image placeholders in `messages`. messages: () where
    `prompt_messages` alone makes them. correct_index: the image to pick, in a task that picks one. labels: N texts, one
    for what each image shows, or none. target: the label asked for, if one is. seed: of the draw, for the record.
    answer: what else is known of the answer, as plain JSON by name; never shown to the model.

    Converts paths as text, arrays of uint8 pixels (height, width, 3), any integer that is no bool, and any iterable for
    a tuple. Raises BrokenEpisode, a ValueError, for anything else.

    >>> Episode(["a.png", "b.png"], (), 1, ["cat", "dog"], "dog", 0).images
    (PosixPath('a.png'), PosixPath('b.png'))
    """

    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...] = ()
    correct_index: int | None = None
    labels: tuple[str, ...] = ()
    target: str | None = None
    seed: int = 0
    answer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _sound_episode(self)

    @property
    def num_candidates(self) -> int:
        """N, the number of images; in a task that picks one, those an index may pick."""
        return len(self.images)


def checked_episode(env: EpisodeSource, index: int) -> Episode:
    """Episode `index` of an environment, checked, with the messages that `prompt_messages` makes.

    Raises BrokenEpisode, which names the episode and the field. An OSError or BadImage of the environment passes: the
    picture is at fault, and --bad_images decides.
    """
    episode = checked_fields(env, index)
    return replace(episode, messages=checked_messages(env, episode, f"episode {index}"))


def checked_fields(env: EpisodeSource, index: int) -> Episode:
    """Episode `index` as `checked_episode` gives it, but with the messages that the environment put into it."""

    def check(given: Any) -> Episode:
        episode = _sound_episode(given)
        for place, label in enumerate(episode.labels):
            require_plain(label, f"labels[{place}]")
        require_plain(episode.target or "", "target")
        return episode

    return asked(lambda: env.episode(index), check, f"episode {index}", "episode")


def checked_messages(env: EpisodeSource, episode: Episode, name: str) -> tuple[Message, ...]:
    """The checked messages of a sound episode. name: its name in errors. Raises as `checked_episode` does."""
    check = partial(_sound_messages, num_images=episode.num_candidates)
    messages = asked(lambda: env.prompt_messages(episode), check, name, "prompt_messages")
    try:
        require_plain_messages(messages, name)
    except NotPlainText as error:
        raise BrokenEpisode(str(error)) from error
    return messages


def require_plain(text: str, what: str) -> None:
    """Raises BrokenEpisode if a text holds a literal that is a token to the model. what: its name, for errors."""
    try:
        require_plain_text(text, what)
    except NotPlainText as error:
        raise BrokenEpisode(str(error)) from error


def asked(ask: Callable[[], Any], check: Callable[[Any], Value], name: str, method: str) -> Value:
    """check(ask()). Raises BrokenEpisode that names the episode for anything that the user's code raises."""
    try:
        with folder_kept():
            given = ask()
            if inspect.iscoroutine(given):
                given.close()  # Python would warn that it was never awaited
                raise BrokenEpisode(f"{method}() is async, but wanted a plain method; call asyncio.run in it")
            return check(given)
    except (BadImage, OSError):
        raise
    except BrokenEpisode as error:
        raise BrokenEpisode(f"{name}: {error}") from error
    # the user's code may also leave by sys.exit
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())[:300]
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise BrokenEpisode(
            f"{name} failed with {type(error).__name__}{f': {words}' if words else ''} "
            f"(in {method}(): {place.filename}, line {place.lineno}); correct it"
        ) from error


def _sound_episode(given: Any) -> Episode:
    """The same episode, its fields converted to their types. Raises BrokenEpisode for a field of another meaning."""
    if not isinstance(given, Episode):
        raise BrokenEpisode(
            f"episode() returned {shown(given)}, but wanted an Episode; return environment.Episode(images=..., "
            "answer=...)"
        )
    images = images_from(given.images)
    if not images:
        raise BrokenEpisode("images is empty, but an episode shows at least one; give it images")
    correct_index = None if given.correct_index is None else _integer(given.correct_index, "correct_index")
    if correct_index is not None and not 0 <= correct_index < len(images):
        raise BrokenEpisode(
            f"correct_index={correct_index}, but the episode has {len(images)} images, numbered from 0; "
            "correct the environment's episode()"
        )
    labels = tuple(text_from(label, f"labels[{place}]") for place, label in enumerate(_items(given.labels, "labels")))
    if labels and len(labels) != len(images):
        raise BrokenEpisode(f"{len(labels)} labels for {len(images)} images; give each image one, in the same order")
    settled = {
        "images": images,
        "messages": tuple(_items(given.messages, "messages")),
        "correct_index": correct_index,
        "labels": labels,
        "target": None if given.target is None else text_from(given.target, "target"),
        "seed": _integer(given.seed, "seed"),
        "answer": _plain(given.answer, "answer"),
    }
    for name, value in settled.items():
        object.__setattr__(given, name, value)
    return given


def images_from(given: Any) -> tuple[ImageSource, ...]:
    """The images of an episode or an observation, converted. Raises BrokenEpisode for one that is none."""
    return tuple(_image(image, place) for place, image in enumerate(_items(given, "images")))


def _items(value: Any, field: str) -> Iterable[Any]:
    """The entries of a list, a tuple, an array or a generator."""
    if isinstance(value, (str, bytes, Mapping, Image.Image)) or not isinstance(value, Iterable):
        raise BrokenEpisode(f"{field} is {shown(value)}, but wanted a list or a tuple; put its entries into one")
    return value


def _integer(value: Any, field: str) -> int:
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    try:
        if not is_bool:
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        pass  # numpy's and torch's numbers that are not whole, and their arrays
    raise BrokenEpisode(f"{field} is {shown(value)}, but wanted a whole number; give an int")


def text_from(value: Any, what: str) -> str:
    """A label, a target or a message's text as a plain str that UTF-8 can hold. what: its name, for errors."""
    if not isinstance(value, str):
        raise BrokenEpisode(f"{what} is {shown(value)}, but wanted text; give a str")
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenEpisode(f"{what} is {ascii(text)[:80]}, which is no UTF-8 text; replace its surrogates") from error
    return text


def _plain(value: Any, field_name: str) -> dict[str, Any]:
    """A copy of a mapping that JSON can hold."""
    if not isinstance(value, Mapping):
        raise BrokenEpisode(f"{field_name} is {shown(value)}, but wanted values by name; give a dict")
    try:
        copied = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BrokenEpisode(f"{field_name} is not plain JSON ({error}); give ints, floats, texts, lists") from error
    return dict(copied)


def _image(image: Any, place: int) -> ImageSource:
    if isinstance(image, (Path, Image.Image)):
        return image
    if isinstance(image, (str, os.PathLike)) and isinstance(os.fspath(image), str):
        return Path(str.__str__(os.fspath(image)))
    shape, dtype = getattr(image, "shape", None), str(getattr(image, "dtype", "")).removeprefix("torch.")
    if shape is None:
        raise BrokenEpisode(
            f"images[{place}] is {shown(image)}, but wanted a path, a PIL image or an array of uint8 pixels"
        )
    is_picture = len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS)
    if dtype != "uint8" or not is_picture or 0 in shape:
        raise BrokenEpisode(
            f"images[{place}] is an array of {dtype} of shape {tuple(shape)}, but wanted uint8 of shape (height, "
            "width, 3) with values from 0 to 255; convert it, or give a path or a PIL image"
        )
    # a torch tensor has no array interface of its own
    pixels = image.cpu().numpy() if hasattr(image, "cpu") else image
    return Image.fromarray(pixels.reshape(shape[:2]) if len(shape) == 3 and shape[2] == 1 else pixels)


def _sound_messages(given: Any, num_images: int) -> tuple[Message, ...]:
    messages = _items(given, "what prompt_messages() returned")
    sound = tuple(_message(message, f"message {place}") for place, message in enumerate(messages))
    num_placeholders = sum(part["type"] == "image" for message in sound for part in message["content"])
    if num_placeholders != num_images:
        raise BrokenEpisode(
            f"{num_images} images and {num_placeholders} image placeholders in its messages; give each image one"
        )
    return sound


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, Mapping):
        raise BrokenEpisode(f'{what} is {shown(message)}, but wanted {{"role": "user", "content": [...]}}')
    if set(message) != {"role", "content"}:
        keys = ", ".join(sorted(map(str, message))) or "none"
        raise BrokenEpisode(f"{what} has the keys {keys}, but wanted role and content; correct it")
    role = text_from(message["role"], f"{what}: role")
    if role not in ROLES:
        raise BrokenEpisode(f"{what} has role {role!r}, but wanted one of {', '.join(ROLES)}; correct it")
    content = message["content"]
    parts: Sequence[Any] = [content] if isinstance(content, str) else list(_items(content, f"{what}: content"))
    return {"role": role, "content": [_part(part, f"{what}, part {number}") for number, part in enumerate(parts)]}


def _part(part: Any, what: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": text_from(part, what)}
    # a data set's rows have every key, with None where a part has no such thing
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if given.keys() == {"type", "text"} and given["type"] == "text":
        return {"type": "text", "text": text_from(given["text"], f"{what}: text")}
    if given.keys() == {"type"} and given["type"] == "image":
        return {"type": "image"}
    raise BrokenEpisode(
        f"{what} is {shown(part)}, but wanted "
        '{"type": "text", "text": ...} or {"type": "image"}, whose picture is in the episode\'s images'
    )


def shown(value: Any) -> str:
    """A value in an error: the beginning of its repr, on one line, and its type."""
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(value).__name__})"
