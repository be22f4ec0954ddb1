"""An environment of your own: every image but one is the same picture, and the other one is to be picked.

    accelerate launch training.py --env examples/odd_one_out.py:OddOneOutEnv --fixed_correct_index none

It names no picture, so comparing is the only way to win. `draw_episode` and `instruction` are all there is to write:
Fleet judges the call, rewards it and shows the images.
"""

import random

from environment import Episode, PickImageEnv, sample_distinct


class OddOneOutEnv(PickImageEnv):
    """Pick the image that differs; `fixed_correct_index` puts it at one place, None draws its place."""

    def draw_episode(self, seed: int, index: int) -> Episode:
        """Two pictures drawn from (seed, index): one fills every place but the odd one."""
        rng = random.Random(f"odd one out/{seed}/{index}")
        common, odd = sample_distinct(self.images, 2, rng)
        drawn_place = int(rng.random() * self.candidates_per_episode)
        place = drawn_place if self.fixed_correct_index is None else self.fixed_correct_index
        shown = [odd if position == place else common for position in range(self.candidates_per_episode)]
        paths, labels = tuple(image.path for image in shown), tuple(image.label for image in shown)
        return self.with_messages(Episode(paths, (), place, labels, odd.label, seed))

    def instruction(self, episode: Episode) -> str:
        """The question, which names no picture."""
        return "All images but one are the same. Pick the one that differs."
