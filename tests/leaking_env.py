"""An environment for the tests whose instruction leaks the answer: it says the place, and no picture tells more."""

from environment import Episode, PickImageEnv

PLACES = ("first", "second", "third", "fourth")


class LeakingEnv(PickImageEnv):
    """PickImageEnv with a target that is named by its place, so that a policy need not look."""

    def instruction(self, episode: Episode) -> str:
        """The sentence with the leak."""
        assert episode.correct_index is not None
        return f"Pick the {PLACES[episode.correct_index]} image."
