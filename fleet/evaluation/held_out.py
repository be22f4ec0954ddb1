"""The held-out episodes: those of another seed that match no episode used in training.

Owns the draw and what counts as alike. Imports no torch.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from itertools import chain

from PIL import Image

from fleet.command.flags import HeldOutFlags
from fleet.command.preflight import make_environment
from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, checked_episode, checked_fields
from fleet.errors import UsageError
from fleet.evaluation.figures import EvaluationPlan
from utils.images import BadImage, image_digest

# Draws per held-out episode before a folder counts as too small to hold anything out.
MAX_DRAWS_PER_EPISODE = 20
# Episodes of a run that are compared with; the later ones of a longer run are not.
MAX_COMPARED_EPISODES = 200_000


class TooFewEpisodes(ValueError):
    """A folder that does not hold as many unseen episodes as are wanted."""


def make_plan(
    held_out: HeldOutFlags,
    runs: Iterable[tuple[EpisodeSource, int]],
    *,
    skipped_images: Collection[str] = (),
    drawn_images: Collection[str] = (),
    num_samples: int = 0,
    ks: tuple[int, ...] = (),
    prompt_style: str | None = None,
) -> EvaluationPlan:
    """The evaluation that the flags ask for, on episodes that none of these runs draws.

    runs: the environment of each run and how many episodes it draws from the first on. skipped_images: what is drawn
    from no more than in training. drawn_images: what is drawn from, deleted ones among them. prompt_style: compare
    prompts under the parser that accepts text before the call; None takes prompt and parser from the flags.
    Raises UsageError if the folder holds too few unseen episodes, or an environment fails.
    """
    prompts_reasoning = held_out.allow_reasoning if prompt_style is None else prompt_style == "reasoning"
    env = make_environment(
        held_out,
        held_out.eval_seed,
        prompts_reasoning=prompts_reasoning,
        skipped_images=skipped_images,
        drawn_images=drawn_images,
    )
    drawn = chain.from_iterable(
        (checked_fields(run_env, index) for index in range(min(num_episodes, MAX_COMPARED_EPISODES)))
        for run_env, num_episodes in runs
    )
    try:
        episodes, num_passed_over = draw_held_out(env, held_out.eval_episodes, drawn)
    except TooFewEpisodes as error:
        raise UsageError(f"eval_episodes={held_out.eval_episodes}: {error}") from error
    except BrokenEpisode as error:
        raise UsageError(f"env={held_out.env}: {error}") from error
    except (BadImage, OSError) as error:
        raise UsageError(f"env={held_out.env}: a held-out episode cannot be drawn ({error})") from error
    return EvaluationPlan(
        env=env,
        episodes=tuple(episodes),
        seed=held_out.eval_seed,
        num_passed_over=num_passed_over,
        num_samples=num_samples,
        ks=ks,
        allow_reasoning=held_out.allow_reasoning or prompt_style is not None,
        prompt_style="reasoning" if prompts_reasoning else "direct",
        max_pixels=held_out.image_max_pixels,
    )


def draw_held_out(env: EpisodeSource, num_episodes: int, drawn: Iterable[Episode] = ()) -> tuple[list[Episode], int]:
    """(episodes, how many were passed over): the first of `env`, each different, that are like none of `drawn`.

    Episodes are alike if they show the same files, or pictures of the same pixels, in the same order and ask for the
    same one. Raises TooFewEpisodes if the folder has too few: 20 draws for each episode that is wanted.
    """
    seen = {fingerprint(episode) for episode in drawn}
    num_drawn = len(seen)
    held_out: list[Episode] = []
    num_draws = 0
    while len(held_out) < num_episodes:
        if num_draws == MAX_DRAWS_PER_EPISODE * num_episodes:
            raise TooFewEpisodes(
                f"{num_draws} draws gave {len(held_out)} different episodes that training does not draw ({num_drawn} "
                f"that it does), and {num_episodes} are wanted; add images, or evaluate on fewer episodes"
            )
        episode = checked_episode(env, num_draws)
        num_draws += 1
        # each once: an episode that came twice would count as two trials
        if (digest := fingerprint(episode)) not in seen:
            seen.add(digest)
            held_out.append(episode)
    return held_out, num_draws - num_episodes


def fingerprint(episode: Episode) -> bytes:
    """16 bytes that are equal for episodes that show the same in the same order and ask for the same one."""
    shown = [
        image_digest(image).hex() if isinstance(image, Image.Image) else os.path.abspath(image)
        for image in episode.images
    ]
    content = json.dumps([shown, episode.correct_index, episode.target])
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
