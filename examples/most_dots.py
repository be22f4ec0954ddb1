"""An environment from nothing but its two methods: pictures drawn in memory, and the one with the most dots to pick.

    accelerate launch training.py --env examples/most_dots.py:MostDotsEnv

It takes two of the arguments that Fleet offers by name, reads no folder, and inherits nothing.
"""

import random

from PIL import Image, ImageDraw

from environment import Episode, system_text

SIDE_PX = 56
MAX_DOTS = 9


class MostDotsEnv:
    """N pictures of different numbers of dots; the one with the most is right."""

    def __init__(self, seed: int = 0, candidates_per_episode: int = 4):
        """seed: of all episodes. candidates_per_episode: N, from 2 to 9."""
        if not 2 <= candidates_per_episode <= MAX_DOTS:
            raise ValueError(f"candidates_per_episode={candidates_per_episode}, but wanted 2 to {MAX_DOTS}; correct it")
        self.seed, self.num_pictures = seed, candidates_per_episode

    def episode(self, index: int) -> Episode:
        """Episode `index`: all that is random in it comes from a generator of (seed, index) alone."""
        rng = random.Random(f"most dots/{self.seed}/{index}")
        counts = rng.sample(range(1, MAX_DOTS + 1), self.num_pictures)
        return Episode(
            images=tuple(draw_dots(count, rng) for count in counts),
            messages=(),
            correct_index=counts.index(max(counts)),
            labels=tuple(f"{count} dots" for count in counts),
            target=None,
            seed=self.seed,
        )

    def prompt_messages(self, episode: Episode) -> list[dict]:
        """The messages that the model reads: the tool, a placeholder a picture behind its number, and the question."""
        content: list[str | dict] = []
        for place in range(len(episode.images)):
            content += [f"Image {place}: ", {"type": "image"}, "\n"]
        content.append(f"Pick the image with the most dots. The index is from 0 to {len(episode.images) - 1}.")
        return [{"role": "system", "content": system_text()}, {"role": "user", "content": content}]


def draw_dots(count: int, rng: random.Random) -> Image.Image:
    """A white picture of SIDE_PX a side with `count` dots in cells of their own."""
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    draw, cell = ImageDraw.Draw(picture), SIDE_PX // 3
    for place in rng.sample(range(9), count):
        left, top = place % 3 * cell + 4, place // 3 * cell + 4
        draw.ellipse((left, top, left + cell - 8, top + cell - 8), fill="black")
    return picture
