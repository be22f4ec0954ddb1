"""The data that a run draws from: all processes agree on it, and the model can read its prompts."""

from pathlib import Path

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from fleet.command.flags import TOY_MODEL_ID, TaskFlags
from fleet.command.image_check import Findings, RunData, first_difference, listing_of, settle
from fleet.episodes import BrokenEpisode, EpisodeSource, checked_episode
from fleet.errors import AgreedUsageError, UsageError
from fleet.model_folder.files import base_of
from fleet.own_code.environment_trial import TRIED, require_same_digests
from fleet.processes import gather_by_rank, result_or_problem, together
from fleet.run.model_setup import naming_the_model
from fleet.toy.model import PLAIN, default_cache_root, folder_name, is_whole
from model_utils import load_processor
from utils.images import BadImage


def agree_on_data(task: TaskFlags, findings: Findings) -> RunData:
    """The data that the run draws from, the same on every process. Every process takes part.

    Raises UsageError on every process if images are bad and stop the run, if machines hold different folders, or if the
    processes draw different episodes.
    """
    if findings.data is not None:
        return findings.data
    digests_by_rank = gather_by_rank(dict(findings.episode_digests))
    try:
        require_same_digests([digests for digests in digests_by_rank if digests])
    except BrokenEpisode as error:
        raise AgreedUsageError(f"env={task.env}: {error}") from error
    shares = gather_by_rank(findings.share)
    if len({None if share is None else share.names_digest for share in shares}) > 1:
        listings = gather_by_rank(listing_of(findings.env, task.data_root))
        raise AgreedUsageError(
            f"the machines hold different images: {first_difference(listings)}; give every machine the same data folder"
        )
    return settle(task, findings.env, shares, findings.beginning)


def require_last_episode(env: EpisodeSource, spec: str, num_episodes: int) -> None:
    """Raises UsageError on every process if a user's environment has not as many episodes as the run draws.

    spec: what --env names.
    """

    def draw_last() -> None:
        try:
            checked_episode(env, num_episodes - 1)
        except BrokenEpisode as error:
            raise UsageError(f"env={spec}, of which the run draws {num_episodes} episodes: {error}") from error
        except (BadImage, OSError):
            # the episode is there, and its picture is a matter of --bad_images
            pass

    together(draw_last)


def problem_of_prompts(task: TaskFlags, findings: Findings | None, model_id: str) -> str | None:
    """The reason why the first prompts of a user's environment do not encode for the model; None if they do.

    None too where the model's processor is not on this machine yet. Started alone, a process raises UsageError itself.
    """
    folder = _processor_folder(model_id)
    if task.env is None or findings is None or folder is None:
        return None
    return result_or_problem(lambda: _require_encodable(task, findings.env, model_id, folder))[1]


def _processor_folder(model_id: str) -> str | None:
    if model_id == TOY_MODEL_ID:
        path = default_cache_root() / folder_name(PLAIN)
        return str(path) if is_whole(path) else None
    return base_of(model_id) if Path(base_of(model_id)).is_dir() else None


def _require_encodable(task: TaskFlags, env: EpisodeSource, model_id: str, folder: str) -> None:
    with naming_the_model(model_id):
        processor = load_processor(folder)
    dataset = RepeatableEpisodeDataset(env, task.image_max_pixels)
    try:
        batch = VLMDataCollator(processor, 1)([dataset[index] for index in TRIED])
    # what a processor raises depends on where it meets what it does not expect
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise UsageError(
            f"env={task.env}: the prompts of episodes {TRIED[0]} to {TRIED[-1]} cannot be encoded for "
            f"{model_id} ({type(error).__name__}: {words}); correct prompt_messages()"
        ) from error
    num_tokens = int((batch["mm_token_type_ids"] == 1).sum())
    num_wanted = int(batch["image_grid_thw"].prod(dim=1).sum()) // processor.image_processor.merge_size**2
    if num_tokens != num_wanted:
        raise UsageError(
            f"env={task.env}: the prompts of episodes {TRIED[0]} to {TRIED[-1]} have {num_tokens} image tokens for "
            f"{num_wanted} of their pictures; correct prompt_messages()"
        )
