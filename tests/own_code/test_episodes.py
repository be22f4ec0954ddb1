"""What an environment may give for an episode: what is taken for what it means, and what is named in a line."""

import warnings
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from environment import Environment
from fleet.episodes import BrokenEpisode, Episode, checked_episode, checked_fields

pytestmark = pytest.mark.fast

IMAGES = (Path("a.png"), Path("b.png"), Path("c.png"))
PLACEHOLDERS = [{"type": "image"}] * 3


class Place(IntEnum):
    SECOND = 1


class Label(StrEnum):
    CAT = "cat"


class Given(Environment):
    """An environment that gives one episode, with fields and messages of the test's choice."""

    def __init__(self, messages: Any = None, **fields: Any):
        self.messages: Any = [{"role": "user", "content": PLACEHOLDERS}] if messages is None else messages
        self.fields = {"images": IMAGES, "messages": (), "correct_index": 1, "labels": ("cat", "dog", "cow"),
                       "target": "dog", "seed": 5, **fields}  # fmt: skip

    def episode(self, index: int) -> Episode:
        return Episode(**self.fields)

    def prompt_messages(self, episode: Episode) -> Any:
        return self.messages


PLAIN = checked_episode(Given(), 0)
SAME = {
    "numpy's integer": {"correct_index": np.int64(1)},
    "an array of no dimension": {"correct_index": np.array(1, dtype=np.uint8)},
    "an enum of integers": {"correct_index": Place.SECOND},
    "numpy's seed": {"seed": np.int32(5)},
    "a list of labels": {"labels": ["cat", "dog", "cow"]},
    "numpy's texts": {"labels": np.array(["cat", "dog", "cow"]), "target": np.str_("dog")},
    "an enum of texts": {"labels": (Label.CAT, "dog", "cow")},
    "a generator of images": {"images": (image for image in IMAGES)},
    "paths as text": {"images": ["a.png", np.str_("b.png"), Path("c.png")]},
}


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME.keys())
def test_what_means_the_same_is_the_same_episode(fields: dict[str, Any]) -> None:
    episode = checked_episode(Given(**fields), 0)
    assert episode == PLAIN
    for value, kind in ((episode.correct_index, int), (episode.seed, int), (episode.target, str)):
        assert type(value) is kind
    assert {type(label) for label in episode.labels} == {str}


PIXELS = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
PICTURES = {
    "arrays": (list(PIXELS), "RGB"),
    "one array of all": (PIXELS, "RGB"),
    "arrays that are not contiguous": (PIXELS[:, ::2, ::2], "RGB"),
    "grey": (PIXELS[..., 0], "L"),
    "grey with a channel": (PIXELS[..., :1], "L"),
    "with transparency": (np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1), "RGBA"),
    "pictures": ([Image.fromarray(pixels) for pixels in PIXELS], "RGB"),
}


@pytest.mark.parametrize(("images", "mode"), PICTURES.values(), ids=PICTURES.keys())
def test_arrays_of_pixels_are_pictures(images: Any, mode: str) -> None:
    for shown, given in zip(checked_episode(Given(images=images), 0).images, images, strict=True):
        assert isinstance(shown, Image.Image) and shown.mode == mode
        assert np.array_equal(np.asarray(shown).reshape(np.asarray(given).shape), np.asarray(given))


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "index past the images": ({"correct_index": 3}, "correct_index=3, but the episode has 3 images, numbered from 0"),
    "index below 0": ({"correct_index": np.int64(-1)}, "correct_index=-1, but the episode has 3 images"),
    "true": ({"correct_index": True}, "correct_index is True (bool), but wanted a whole number; give an int"),
    "numpy's true": ({"correct_index": np.True_}, "correct_index is np.True_ (bool), but wanted a whole number"),
    "float": ({"correct_index": 1.0}, "correct_index is 1.0 (float), but wanted a whole number"),
    "numpy's float": ({"correct_index": np.float32(1)}, "(float32), but wanted a whole number"),
    "an array of one": ({"correct_index": np.array([1])}, "correct_index is array([1]) (ndarray), but wanted a whole"),
    "index as text": ({"correct_index": "1"}, "correct_index is '1' (str), but wanted a whole number"),
    "no seed": ({"seed": None}, "seed is None (NoneType), but wanted a whole number"),
    "no images": ({"images": (), "labels": ()}, "images is empty, but an episode shows at least one"),
    "a path for the images": ({"images": "a.png"}, "images is 'a.png' (str), but wanted a list or a tuple"),
    "a picture for the images": ({"images": Image.new("L", (2, 2))}, "(Image), but wanted a list or a tuple"),
    "bytes": ({"images": (b"x",) * 3}, "images[0] is b'x' (bytes), but wanted a path, a PIL image or an array"),
    "an image missing": ({"images": (*IMAGES[:2], None)}, "images[2] is None (NoneType), but wanted a path"),
    "shares of one": ({"images": PIXELS / 255}, "images[0] is an array of float64 of shape (4, 5, 3), but wanted"),
    "channels first": ({"images": np.moveaxis(PIXELS, -1, 1)}, "an array of uint8 of shape (3, 4, 5), but wanted"),
    "no pixels": ({"images": PIXELS[:, :0]}, "an array of uint8 of shape (0, 5, 3), but wanted uint8 of shape"),
    "a label short": ({"labels": ("cat", "dog")}, "2 labels for 3 images; give each image one, in the same order"),
    "labels as one text": ({"labels": "abc"}, "labels is 'abc' (str), but wanted a list or a tuple"),
    "numbered labels": ({"labels": (1, 2, 3)}, "labels[0] is 1 (int), but wanted text; give a str"),
    "no label": ({"labels": ("cat", None, "cow")}, "labels[1] is None (NoneType), but wanted text"),
    "a label that is no text": ({"labels": ("cat", "\ud800", "cow")}, "labels[1] is '\\ud800', which is no UTF-8 text"),
    "a target that is missing": ({"target": float("nan")}, "target is nan (float), but wanted text"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_episode_is_named_with_its_number_and_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BrokenEpisode) as broken:
        checked_episode(Given(**fields), 7000)
    assert str(broken.value).startswith("episode 7000: ") and words in str(broken.value)
    assert "\n" not in str(broken.value)


@pytest.mark.parametrize("returned", [None, {"images": IMAGES}, (IMAGES, (), 1), 3, "episode", Episode])
def test_what_is_none_at_all_is_told_of_episode(returned: Any) -> None:
    class Returning(Given):
        def episode(self, index: int) -> Any:
            return returned

    with pytest.raises(BrokenEpisode, match=r"episode 3: episode\(\) returned .*, but wanted an Episode; return env"):
        checked_fields(Returning(), 3)


def test_a_method_that_is_async_is_told_so_without_a_warning_of_pythons() -> None:
    class Waiting(Given):
        async def episode(self, index: int) -> Episode:  # type: ignore[override]
            return Episode(**self.fields)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            BrokenEpisode, match=r"episode 3: episode\(\) is async, but wanted a plain method; call asy"
        ):
            checked_episode(Waiting(), 3)  # type: ignore[arg-type]


def test_what_an_environment_raises_is_one_line_with_its_place() -> None:
    class Failing(Given):
        def prompt_messages(self, episode: Episode) -> Any:
            raise KeyError("a\nb")

    with pytest.raises(BrokenEpisode) as broken:
        checked_episode(Failing(), 12)
    assert "episode 12 failed with KeyError: 'a\\nb' (in prompt_messages(): " in str(broken.value)
    assert f"{Path(__file__).name}, line " in str(broken.value)


@pytest.mark.parametrize("error", [FileNotFoundError("gone.png"), PermissionError("mine.png")])
def test_a_file_that_does_not_open_is_the_files_fault(error: OSError) -> None:
    class Opening(Given):
        def episode(self, index: int) -> Episode:
            raise error

    with pytest.raises(type(error)):
        checked_episode(Opening(), 0)


def test_an_episode_of_a_kind_of_ones_own_stays_of_its_kind() -> None:
    @dataclass(frozen=True)
    class Noted(Episode):
        note: str = ""

    class Noting(Given):
        def episode(self, index: int) -> Episode:
            return Noted(**self.fields, note="mine")

    episode = checked_episode(Noting(labels=["cat", "dog", "cow"]), 0)
    assert isinstance(episode, Noted) and episode.note == "mine" and episode.labels == ("cat", "dog", "cow")


# --- messages ---------------------------------------------------------------------------------------------------------

WANTED = (
    {"role": "system", "content": [{"type": "text", "text": "Pick."}]},
    {"role": "user", "content": [*PLACEHOLDERS, {"type": "text", "text": "Which?"}]},
)
USER = WANTED[1]
SAME_MESSAGES = {
    "a tuple": WANTED,
    "a list": list(WANTED),
    "a generator": lambda: iter(WANTED),
    "content as text": [{"role": "system", "content": "Pick."}, USER],
    "numpy's texts": [{"role": np.str_("system"), "content": np.str_("Pick.")}, USER],
    "parts as text": [
        {"role": "system", "content": ("Pick.",)},
        {"role": "user", "content": [*PLACEHOLDERS, "Which?"]},
    ],
    "rows of a data set": [
        {"role": "system", "content": [{"type": "text", "text": "Pick.", "image": None}]},
        {"role": "user", "content": [*[{"type": "image", "text": None}] * 3, {"type": "text", "text": "Which?"}]},
    ],
}


@pytest.mark.parametrize("messages", SAME_MESSAGES.values(), ids=SAME_MESSAGES.keys())
def test_messages_that_mean_the_same_are_the_same(messages: Any) -> None:
    given = messages() if callable(messages) else messages
    assert checked_episode(Given(given), 0).messages == WANTED


BROKEN_MESSAGES: dict[str, tuple[Any, str]] = {
    "text alone": ("Pick one.", "what prompt_messages() returned is 'Pick one.' (str), but wanted a list or a tuple"),
    "one message": ({"role": "user", "content": "a"}, "(dict), but wanted a list or a tuple"),
    "a message as text": (["Pick"], """message 0 is 'Pick' (str), but wanted {"role": "user", "content": [...]}"""),
    "no content": ([{"role": "system"}, USER], "message 0 has the keys role, but wanted role and content"),
    "no role": ([{"content": "a"}, USER], "message 0 has the keys content, but wanted role and content"),
    "a further key": (
        [{**USER, "name": "x"}],
        "message 0 has the keys content, name, role, but wanted role and content",
    ),
    "empty content": ([{"role": "system", "content": None}, USER], "message 0: content is None (NoneType)"),
    "an odd role": ([{**USER, "role": "User"}], "message 0 has role 'User', but wanted one of system, user, assistant"),
    "an image too few": ([{"role": "user", "content": PLACEHOLDERS[:2]}], "3 images and 2 image placeholders in its"),
    "an image too many": ([USER, {"role": "user", "content": PLACEHOLDERS[:1]}], "3 images and 4 image placeholders"),
    "no messages": ([], "3 images and 0 image placeholders"),
    "a picture in a part": (
        [{"role": "user", "content": [{"type": "image", "image": "a.png"}] * 3}],
        "message 0, part 0 is {'type': 'image', 'image': 'a.png'} (dict), but wanted",
    ),
    "a video": ([{"role": "user", "content": [{"type": "video"}]}], "message 0, part 0 is {'type': 'video'} (dict)"),
    "a part without text": ([{"role": "user", "content": [*PLACEHOLDERS, {"type": "text"}]}], "message 0, part 3 is"),
    "a number for text": (
        [{"role": "user", "content": [*PLACEHOLDERS, {"type": "text", "text": 4}]}],
        "message 0, part 3: text is 4 (int), but wanted text",
    ),
    "text that is none": ([{"role": "system", "content": "\udfff"}, USER], "'\\udfff', which is no UTF-8 text"),
}


@pytest.mark.parametrize(("messages", "words"), BROKEN_MESSAGES.values(), ids=BROKEN_MESSAGES.keys())
def test_messages_that_are_none_are_named_with_their_place(messages: Any, words: str) -> None:
    with pytest.raises(BrokenEpisode) as broken:
        checked_episode(Given(messages), 4)
    assert str(broken.value).startswith("episode 4: ") and words in str(broken.value)
