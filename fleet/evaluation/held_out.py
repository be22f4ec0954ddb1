"""The held-out episodes use another seed and match no episode used in training. Imports no torch."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from PIL import Image

from fleet.command.data_sets import COLUMN_FLAGS
from fleet.command.evaluate_options import run_config, run_options
from fleet.command.flags import HeldOutFlags, TaskFlags
from fleet.command.preflight import make_environment
from fleet.episode_numbers import numbers_drawn
from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, checked_fields
from fleet.errors import UsageError, refused
from fleet.evaluation.figures import EvaluationPlan
from fleet.known_answers import answerable_episode
from utils.images import BadImage, image_digest

logger = logging.getLogger("fleet")

MAX_DRAWS_PER_EPISODE = 20  # held-out, before a folder counts as too small
MAX_COMPARED_EPISODES = 200_000  # of a run, from the first on

# the flags that say which episodes a run has
TASK = ("data_root", *COLUMN_FLAGS, "env", "env_args", "candidates_per_episode", "fixed_correct_index")


@dataclass(frozen=True)
class RunEpisodes:
    """The episodes that a run draws, or may draw."""

    env: EpisodeSource
    num_episodes: int
    num_attempts: int = 0  # to replace a group, each with a further episode

    def __iter__(self) -> Iterator[Episode]:
        """The first of them, without the messages that prompt_messages makes."""
        numbers = numbers_drawn(self.num_episodes, self.num_attempts)
        return (checked_fields(self.env, number) for number in islice(numbers, MAX_COMPARED_EPISODES))


class TooFewEpisodes(ValueError):
    """The folder holds too few unseen episodes."""


def make_plan(
    held_out: HeldOutFlags,
    runs: Iterable[RunEpisodes],
    *,
    skipped_images: Collection[str] = (),
    drawn_images: Collection[str] = (),
    num_samples: int = 0,
    ks: tuple[int, ...] = (),
    prompt_style: str | None = None,
    num_episodes_flag: str = "eval_episodes",
) -> EvaluationPlan:
    """The evaluation that the flags ask for, on episodes that none of these runs draws.

    skipped_images, drawn_images: as for make_environment. prompt_style: the prompt, with the parser that accepts text
    before the call; None takes prompt and parser from the flags. num_episodes_flag: has the number of episodes.
    Raises UsageError if the folder holds too few unseen episodes, or an environment fails.
    """
    reasons = held_out.allow_reasoning if prompt_style is None else prompt_style == "reasoning"
    images = {"skipped_images": skipped_images, "drawn_images": drawn_images}
    env = make_environment(replace(held_out, allow_reasoning=reasons), held_out.eval_seed, **images)
    named, num_episodes = f"env={held_out.env}: ", getattr(held_out, num_episodes_flag)
    with (
        refused(TooFewEpisodes, before=f"{num_episodes_flag}={num_episodes}: "),
        refused(BrokenEpisode, before=named),
        refused(BadImage, OSError, before=f"{named}a held-out episode cannot be drawn (", after=")"),
    ):
        episodes, num_passed_over = draw_held_out(env, num_episodes, chain.from_iterable(runs))
    return EvaluationPlan(
        env=env,
        episodes=tuple(episodes),
        seed=held_out.eval_seed,
        num_passed_over=num_passed_over,
        num_samples=num_samples,
        ks=ks,
        allow_reasoning=held_out.allow_reasoning or prompt_style is not None,
        prompt_style="reasoning" if reasons else "direct",
        max_pixels=held_out.image_max_pixels,
        max_turns=held_out.max_turns,
    )


def runs_behind(task: TaskFlags, model_id: str) -> list[RunEpisodes]:
    """The episodes of the run that left this model, and of those before it."""
    runs, folders = list[RunEpisodes](), set()
    while (config := run_config(model_id)) and Path(model_id).resolve() not in folders:
        folders.add(Path(model_id).resolve())
        run = run_options(model_id)
        try:
            num_episodes = int(config["num_episodes"])
            env = make_environment(
                # a run of an older Fleet has no env_args
                replace(task, **{"env_args": None} | {name: run[name] for name in TASK if name in run}),
                run["seed"],
                skipped_images=config.get("skipped_images", ()),
            )
        except (KeyError, UsageError) as error:
            logger.info(
                f"the training episodes of {model_id} are unknown, so held-out episodes may repeat them: {error}"
            )
        else:
            # a run of an older Fleet replaced no group
            runs.append(RunEpisodes(env, num_episodes, int(run.get("dynamic_sampling", 0))))
        model_id = str(run.get("model_id"))
    return runs


def draw_held_out(env: EpisodeSource, num_episodes: int, drawn: Iterable[Episode] = ()) -> tuple[list[Episode], int]:
    """(episodes, number passed over): the first of `env` that are unlike each other and all of `drawn`.

    Episodes are alike if they show the same files or pixels in the same order and ask for the same one. Raises
    TooFewEpisodes after 20 draws for each that is wanted.
    """
    seen = {fingerprint(episode) for episode in drawn}
    num_drawn = len(seen)
    held_out: list[Episode] = []
    num_draws = MAX_DRAWS_PER_EPISODE * num_episodes
    for number in range(num_draws):
        episode = answerable_episode(env, number)
        # an episode that came twice would count as two trials
        if (digest := fingerprint(episode)) not in seen:
            seen.add(digest)
            held_out.append(episode)
        if len(held_out) == num_episodes:
            return held_out, number + 1 - num_episodes
    raise TooFewEpisodes(
        f"{num_draws} draws gave {len(held_out)} different episodes that training does not draw ({num_drawn} "
        f"that it draws or may draw), and {num_episodes} are wanted; add images, evaluate on fewer episodes, or lower "
        "dynamic_sampling"
    )


def fingerprint(episode: Episode) -> bytes:
    """16 bytes, equal for episodes that are alike."""
    shown = [
        image_digest(image).hex() if isinstance(image, Image.Image) else os.path.abspath(image)
        for image in episode.images
    ]
    asked = [shown, episode.correct_index, episode.target]
    content = json.dumps([*asked, episode.answer] if episode.answer else asked)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
