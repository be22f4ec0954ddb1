"""The data that a run draws from: all processes agree on it, and the model can read its prompts."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from fleet.command.data_sets import image_root
from fleet.command.flags import TOY_MODEL_ID, TaskFlags
from fleet.command.image_check import Findings, RunData, first_difference, listing_of, settle
from fleet.episode_numbers import further_number
from fleet.episodes import BrokenEpisode, EpisodeSource, checked_episode
from fleet.errors import AgreedUsageError, UsageError, one_line, refused
from fleet.model_folder.files import base_of
from fleet.own_code.environment_trial import TRIED, require_same_digests
from fleet.processes import gather_by_rank, together
from fleet.run.model_setup import naming_the_model
from fleet.toy.model import cached_path, is_whole
from fleet.toy.process import kind_for
from model_utils import load_processor
from utils.images import BadImage

# episodes whose prompts are measured before vLLM starts
NUM_MEASURED = 256


def agree_on_data(task: TaskFlags, findings: Findings | None) -> RunData:
    """The data that the run draws from, the same on every process. Every process takes part.

    Raises UsageError on all if bad images stop the run, machines hold different images, or processes draw
    different episodes.
    """
    assert findings is not None, "a process without findings has a problem, which is raised by now"
    if findings.data is not None:
        return findings.data
    digests_by_rank = gather_by_rank(dict(findings.episode_digests))
    try:
        require_same_digests([digests for digests in digests_by_rank if digests])
    except BrokenEpisode as error:
        raise AgreedUsageError(f"env={task.env}: {error}") from error
    shares = gather_by_rank(findings.share)
    if len({None if share is None else share.names_digest for share in shares}) > 1:
        listings = gather_by_rank(listing_of(findings.env, image_root(task)))
        raise AgreedUsageError(
            f"the machines hold different images: {first_difference(listings)}; give every machine the same data folder"
        )
    return settle(task, findings.env, shares, findings.beginning)


def require_last_episode(env: EpisodeSource, spec: str, num_episodes: int, num_attempts: int = 0) -> None:
    """Raises UsageError on every process if the environment of --env has fewer episodes than the run may draw.

    num_attempts: to replace a group.
    """
    words = f"env={spec}, of which the run draws {num_episodes} episodes: "
    if num_attempts:
        words = f"env={spec}, of which dynamic_sampling={num_attempts} draws episodes beyond the run's {num_episodes}: "

    def draw_last() -> None:
        # with a bad picture the episode is there, and --bad_images decides
        with suppress(BadImage, OSError), refused(BrokenEpisode, before=words):
            checked_episode(env, further_number(num_episodes - 1, num_attempts))

    together(draw_last)


def longest_prompt(env: EpisodeSource, processor: Any, max_pixels: int, num_episodes: int) -> int:
    """The tokens of the longest prompt of a run's first 256 episodes, each image counted as max_pixels large.

    An episode that cannot be shown is left out; the run decides about it when it is due.
    """
    images = processor.image_processor
    # it enlarges the smallest
    most = max(max_pixels, images.size["shortest_edge"]) // (images.patch_size * images.merge_size) ** 2
    lengths = [0]
    for number in range(min(num_episodes, NUM_MEASURED)):
        with suppress(BadImage, OSError, BrokenEpisode):
            episode = checked_episode(env, number)
            text = processor.apply_chat_template(list(episode.messages), tokenize=False, add_generation_prompt=True)
            # the text has one token an image
            lengths.append(len(processor.tokenizer(text)["input_ids"]) + len(episode.images) * (most - 1))
    return max(lengths)


def require_encodable_prompts(task: TaskFlags, findings: Findings | None, model_id: str) -> None:
    """Raises UsageError if a user's first prompts do not encode for a model whose processor is on this machine."""
    if task.env is None or findings is None:
        return
    folder = cached_path(*kind_for(task)) if model_id == TOY_MODEL_ID else Path(base_of(model_id))
    if not (is_whole(folder) if model_id == TOY_MODEL_ID else folder.is_dir()):
        return
    with naming_the_model(model_id):
        processor = load_processor(str(folder))
    dataset = RepeatableEpisodeDataset(findings.env, task.image_max_pixels)
    prompts = f"env={task.env}: the prompts of episodes {TRIED[0]} to {TRIED[-1]}"
    try:
        batch = VLMDataCollator(processor, 1)([dataset[index] for index in TRIED])
    # a processor may raise anything for what it does not expect
    except Exception as error:
        words = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise UsageError(f"{prompts} cannot be encoded for {model_id} ({words}); correct prompt_messages()") from error
    num_tokens = int((batch["mm_token_type_ids"] == 1).sum())
    num_wanted = int(batch["image_grid_thw"].prod(dim=1).sum()) // processor.image_processor.merge_size**2
    if num_tokens != num_wanted:
        raise UsageError(
            f"{prompts} have {num_tokens} image tokens, but their pictures need {num_wanted}; correct prompt_messages()"
        )
