"""An environment for the tests whose instruction leaks the answer: the name that is asked for goes with its place."""

from dataclasses import replace

from environment import Episode, PickImageEnv


class LeakingEnv(PickImageEnv):
    """PickImageEnv with a drawn target, whose place follows from its name: a policy need not look."""

    def __init__(self, data_root: str, candidates_per_episode: int = 4, seed: int = 0, **others: object):
        """The others are dropped: the target is always drawn and named."""
        super().__init__(data_root, candidates_per_episode, None, seed)

    def episode(self, index: int) -> Episode:
        """The episode with its target moved to the place that goes with its name."""
        episode = super().episode(index)
        assert episode.correct_index is not None and episode.target is not None
        order = list(range(episode.num_candidates))
        names = sorted({image.label for image in self.images})
        place = names.index(episode.target) % episode.num_candidates
        order[place], order[episode.correct_index] = order[episode.correct_index], order[place]
        moved = replace(
            episode,
            images=tuple(episode.images[at] for at in order),
            labels=tuple(episode.labels[at] for at in order),
            correct_index=place,
        )
        return self.with_messages(moved)
