"""Changes to an episode that tell a policy that looks from a policy with a habit.

Owns the changes, of pictures and their order; evaluation/figures.py counts the answers. Each change is a pure function
of the episode and a seeded generator.
"""

import random
from dataclasses import replace

from PIL import Image, ImageEnhance

from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, checked_messages
from fleet.errors import RunStopped
from utils.images import BadImage, open_image

# each control: what its figure counts, and which figure is good
CONTROL_MEANINGS = {
    "blank_images": "right with every picture grey: good near chance, far above it the answer leaks elsewhere",
    "swapped_images": "follows the picture it chose to its new place: good near 100 %",
    "permuted_order": "stays at its place though another picture is there: good near 0 %, high is a habit",
    "redrawn_images": "right on the pictures in another size, place, shade: good near the greedy accuracy",
}
BLANK_GREY = (128, 128, 128)
MAX_SCALE_CHANGE, MAX_SHIFT, MAX_SHADE_CHANGE = 0.25, 0.14, 0.2


def blanked(episode: Episode, max_pixels: int | None = None) -> Episode:
    """The episode with every picture grey; text, places and sizes are left. max_pixels: budget of one image."""
    sizes = [open_image(image, max_pixels).size for image in episode.images]
    return replace(episode, images=tuple(Image.new("RGB", size, BLANK_GREY) for size in sizes))


def with_pictures_redrawn(episode: Episode, rng: random.Random, max_pixels: int | None = None) -> Episode:
    """The episode with every picture in another size, place and shade (see `redrawn`), within `max_pixels`."""
    return replace(episode, images=tuple(redrawn(open_image(image, max_pixels), rng) for image in episode.images))


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


def with_order_permuted(env: EpisodeSource, episode: Episode, index: int, rng: random.Random) -> Episode | None:
    """The episode with its candidates in another order, in which `index` shows another picture; messages made anew.

    A policy with a habit stays at `index`; a policy that looks leaves it. None if all pictures are the same. Raises
    RunStopped, the same on every process, if the environment makes no messages of it.
    """
    newcomer = _other_place(episode, index, rng)
    if newcomer is None:
        return None
    rest = [place for place in range(episode.num_candidates) if place != newcomer]
    rng.shuffle(rest)
    permuted = _reordered(episode, [*rest[:index], newcomer, *rest[index:]])
    try:
        messages = checked_messages(env, permuted, "an episode in another order")
    except (BrokenEpisode, BadImage, OSError) as error:
        raise RunStopped(f"the environment is broken: {error}; correct the file of --env") from error
    return replace(permuted, messages=messages)


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
        labels=tuple(episode.labels[place] for place in order),
        correct_index=order.index(episode.correct_index),
    )
