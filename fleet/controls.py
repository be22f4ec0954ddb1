"""Changes to an episode after which it is known what a policy that looks answers, and what a habit answers.

Owns the changes, of pictures and their order; how the answers to them count is in evaluation/figures.py. Each is a pure
function of the episode and a seeded generator.
"""

import random
from dataclasses import replace

from PIL import Image, ImageEnhance

from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, checked_messages
from fleet.errors import RunStopped
from utils.images import BadImage, open_image

# of each control: what its figure counts, and which figure is good
CONTROL_MEANINGS = {
    "blank_images": "right with every picture grey: good near chance, far above it the answer is not in the pictures",
    "swapped_images": "follows the picture it chose to its new place: good near 100 %",
    "permuted_order": "stays at its place though another picture is there: good near 0 %, high is a habit",
    "redrawn_images": "right on the pictures in another size, place, shade: good near the greedy accuracy",
}
BLANK_GREY = (128, 128, 128)
MAX_SCALE_CHANGE, MAX_SHIFT, MAX_SHADE_CHANGE = 0.25, 0.14, 0.2


def blanked(episode: Episode, max_pixels: int | None = None) -> Episode:
    """The episode with every picture grey: all that is left to go by is text, position and the pictures' sizes.

    max_pixels: budget of one image, see utils.images.open_image.
    """
    sizes = [open_image(image, max_pixels).size for image in episode.images]
    return replace(episode, images=tuple(Image.new("RGB", size, BLANK_GREY) for size in sizes))


def with_pictures_redrawn(episode: Episode, rng: random.Random, max_pixels: int | None = None) -> Episode:
    """The episode with every picture in another size, place and shade (see `redrawn`), within `max_pixels`."""
    return replace(episode, images=tuple(redrawn(open_image(image, max_pixels), rng) for image in episode.images))


def with_picture_swapped(episode: Episode, index: int, rng: random.Random) -> tuple[Episode, int] | None:
    """The episode with the picture at `index` and another one in each other's place, and where the picture went.

    The messages stay, so that a policy that looks follows the picture. None if all pictures are the same.
    """
    others = _different(episode, index)
    if not others:
        return None
    partner = others[int(rng.random() * len(others))]
    order = list(range(episode.num_candidates))
    order[index], order[partner] = partner, index
    return _reordered(episode, order), partner


def with_order_permuted(env: EpisodeSource, episode: Episode, index: int, rng: random.Random) -> Episode | None:
    """The episode with its candidates in another order, in which `index` shows another picture; messages made anew.

    A policy with a habit stays at `index`, one that looks does not. None if all pictures are the same. Raises
    RunStopped if the environment makes no messages of it, as every process does the same.
    """
    others = _different(episode, index)
    if not others:
        return None
    newcomer = others[int(rng.random() * len(others))]
    rest = [place for place in range(episode.num_candidates) if place != newcomer]
    rng.shuffle(rest)
    order = [*rest[:index], newcomer, *rest[index:]]
    permuted = _reordered(episode, order)
    try:
        messages = checked_messages(env, permuted, "an episode in another order")
    except (BrokenEpisode, BadImage, OSError) as error:
        raise RunStopped(f"the environment is broken: {error}; correct the file of --env") from error
    return replace(permuted, messages=messages)


def redrawn(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture in another size (up to 25 % more or less), place (14 % of a side) and shade (20 %).

    What comes into view at the sides has the colour of the first pixel.
    """
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


def _different(episode: Episode, index: int) -> list[int]:
    """The places whose picture is not the one at `index`."""
    return [place for place, image in enumerate(episode.images) if image != episode.images[index]]


def _reordered(episode: Episode, order: list[int]) -> Episode:
    """The episode whose place i shows what was at order[i]."""
    return replace(
        episode,
        images=tuple(episode.images[place] for place in order),
        labels=tuple(episode.labels[place] for place in order),
        correct_index=order.index(episode.correct_index),
    )
