"""Changes to an episode that tell a policy that looks from a policy with a habit.

Owns the changes, of pictures and their order, which an environment's `edited` may use; evaluation/figures.py counts the
answers. Each change is a pure function of the episode and a seeded generator.
"""

import random
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from PIL import Image, ImageEnhance

from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, asked, checked_messages, shown
from utils.images import open_image
from utils.tool_calls import ToolCall


class Control(StrEnum):
    """The controls of evaluation."""

    BLANK_IMAGES = "blank_images"
    SWAPPED_IMAGES = "swapped_images"
    PERMUTED_ORDER = "permuted_order"
    REDRAWN_IMAGES = "redrawn_images"


# each control: what its figure counts, and which figure is good
CONTROL_MEANINGS = {
    Control.BLANK_IMAGES: "right with every picture grey: good near chance, far above it the answer leaks elsewhere",
    Control.SWAPPED_IMAGES: "follows what it chose to its new place: good near 100 %",
    Control.PERMUTED_ORDER: "stays at its place though something else is there: good near 0 %, high is a habit",
    Control.REDRAWN_IMAGES: "right on the pictures in another size, place, shade: good near the greedy accuracy",
}
# the order in which an episode is changed: those that every answer has, then those that need a valid call
OF_EVERY_ANSWER = (Control.BLANK_IMAGES, Control.REDRAWN_IMAGES)
OF_A_VALID_CALL = (Control.SWAPPED_IMAGES, Control.PERMUTED_ORDER)
NO_SUCH_CONTROL = "no such control for this environment"
BLANK_GREY = (128, 128, 128)
MAX_SCALE_CHANGE, MAX_SHIFT, MAX_SHADE_CHANGE = 0.25, 0.14, 0.2


@dataclass(frozen=True)
class Edited:
    """A changed episode. expected: the call that counts as a hit; None counts any right answer."""

    episode: Episode
    expected: ToolCall | None = None


def checked_edit(
    env: EpisodeSource, episode: Episode, control: Control, call: ToolCall, rng: random.Random
) -> Edited | None:
    """The environment's change of a sound episode, checked; None where it has no such control.

    Raises BrokenEpisode for anything else than a sound episode with as many placeholders as images.
    """

    def check(given: Any) -> Edited | None:
        if given is None:
            return None
        changed = Edited(given) if isinstance(given, Episode) else given
        if not isinstance(changed, Edited) or not isinstance(changed.episode, Episode):
            raise BrokenEpisode(f"edited() returned {shown(given)}, but wanted an Episode, an Edited, or None")
        if not isinstance(changed.expected, ToolCall | None):
            raise BrokenEpisode(
                f"edited() returned {shown(changed.expected)} as expected, but wanted a ToolCall or None"
            )
        return changed

    name = f"the episode of control {control}"
    changed = asked(lambda: env.edited(episode, control, call, rng), check, name, "edited")
    if changed is None:
        return None
    if changed.episode.messages is episode.messages and changed.episode.num_candidates == episode.num_candidates:
        return changed
    sound = replace(changed.episode, messages=checked_messages(env, changed.episode, name))
    return replace(changed, episode=sound)


def with_pictures_opened(episode: Episode, max_pixels: int | None) -> Episode:
    """The episode with its pictures in memory, each within the budget of pixels."""
    return replace(episode, images=tuple(open_image(image, max_pixels) for image in episode.images))


def blanked(episode: Episode) -> Episode:
    """The episode with every picture grey; text, places and sizes are left."""
    sizes = [open_image(image).size for image in episode.images]
    return replace(episode, images=tuple(Image.new("RGB", size, BLANK_GREY) for size in sizes))


def with_pictures_redrawn(episode: Episode, rng: random.Random) -> Episode:
    """The episode with every picture in another size, place and shade (see `redrawn`)."""
    return replace(episode, images=tuple(redrawn(open_image(image), rng) for image in episode.images))


def with_picture_swapped(episode: Episode, index: int, rng: random.Random) -> tuple[Episode, int] | None:
    """The episode with the pictures at `index` and at another place swapped, and that place.

    The messages stay, so that a policy that looks follows the picture. None if all pictures are the same.
    """
    partner = _other_place(episode, index, rng)
    if partner is None:
        return None
    order = list(range(episode.num_candidates))
    order[index], order[partner] = partner, index
    return _reordered(episode, order), partner


def with_order_permuted(episode: Episode, index: int, rng: random.Random) -> Episode | None:
    """The episode with its candidates in another order, in which `index` shows another picture.

    Its messages are still the old ones. A policy with a habit stays at `index`; a policy that looks leaves it. None if
    all pictures are the same.
    """
    newcomer = _other_place(episode, index, rng)
    if newcomer is None:
        return None
    rest = [place for place in range(episode.num_candidates) if place != newcomer]
    rng.shuffle(rest)
    return _reordered(episode, [*rest[:index], newcomer, *rest[index:]])


def redrawn(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture in another size (up to 25 % more or less), place (14 % of a side) and shade (20 %)."""
    width, height = picture.size
    scale = 1 + rng.uniform(-MAX_SCALE_CHANGE, MAX_SCALE_CHANGE)
    centre_x = width * (0.5 + rng.uniform(-MAX_SHIFT, MAX_SHIFT))
    centre_y = height * (0.5 + rng.uniform(-MAX_SHIFT, MAX_SHIFT))
    # Pillow's matrix says where in the picture each pixel of the result comes from
    matrix = (1 / scale, 0, width / 2 - centre_x / scale, 0, 1 / scale, height / 2 - centre_y / scale)
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=picture.getpixel((0, 0))
    )
    return ImageEnhance.Brightness(moved).enhance(1 + rng.uniform(-MAX_SHADE_CHANGE, MAX_SHADE_CHANGE))


def _other_place(episode: Episode, index: int, rng: random.Random) -> int | None:
    """A random place with another picture than the one at `index`; None if all pictures are the same."""
    others = [place for place, image in enumerate(episode.images) if image != episode.images[index]]
    return others[int(rng.random() * len(others))] if others else None


def _reordered(episode: Episode, order: list[int]) -> Episode:
    """The episode whose place i shows what was at order[i]."""
    return replace(
        episode,
        images=tuple(episode.images[place] for place in order),
        labels=tuple(episode.labels[place] for place in order) if episode.labels else (),
        correct_index=None if episode.correct_index is None else order.index(episode.correct_index),
    )
