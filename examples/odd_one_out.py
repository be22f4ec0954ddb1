"""An environment of your own: every image but one is the same picture, and the other one is to be picked.

    accelerate launch training.py --env examples/odd_one_out.py:OddOneOutEnv --config examples/odd_one_out.yaml

It names no picture, so comparing is the only way to win. Chance is 1 in `candidates_per_episode`. `draw_episode` and
`instruction` are all there is to write: Fleet judges the call, rewards it and shows the images.
"""

import random

from environment import Episode, PickImageEnv, sample_distinct
from fleet.controls import redrawn
from utils.images import open_image


class OddOneOutEnv(PickImageEnv):
    """Pick the image that differs; `fixed_correct_index` puts it at one place, None draws its place."""

    def draw_episode(self, seed: int, index: int) -> Episode:
        """Two pictures drawn from (seed, index): one fills every place but the odd one.

        Each is redrawn in another size, place and shade, so that there are more episodes than pairs of pictures.
        """
        rng = random.Random(f"odd one out/{seed}/{index}")
        common, odd = sample_distinct(self.images, 2, rng)
        drawn_place = int(rng.random() * self.candidates_per_episode)
        place = drawn_place if self.fixed_correct_index is None else self.fixed_correct_index
        pair = [(redrawn(open_image(image.path), rng), image.label) for image in (common, odd)]
        shown = [pair[position == place] for position in range(self.candidates_per_episode)]
        images, labels = zip(*shown, strict=True)
        return self.with_messages(Episode(images, (), place, labels, odd.label, seed))

    def instruction(self, episode: Episode) -> str:
        """The question, which names no picture."""
        return "All images but one are the same. Pick the one that differs."
