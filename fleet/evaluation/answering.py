"""A Qwen2.5-VL as a policy for evaluation: batches of episodes in, texts out, each prompt computed once.

Owns batching, the split over processes and decoding. figures.py judges the answers.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from PIL import Image

from dataset import EpisodeBatch, VLMDataCollator, episode_row
from environment import Episode, EpisodeSource
from fleet.errors import RunStopped
from fleet.evaluation.figures import Answers, EvaluationPlan, Said
from fleet.qwen.drafts import DraftMemory, within_budget
from fleet.qwen.draws import named_uniforms
from fleet.qwen.observations import TURN_END
from fleet.qwen.sampling_pieces import sample_batch
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.tool_answers import ToolAnswers, TurnSettings, tool_answers
from fleet.qwen.tree_sampling import SamplingRequest
from model_utils import answer_config, decode_completion, end_token_ids
from utils.images import BadImage, image_digest, open_image

logger = logging.getLogger("fleet")


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of generation; those from `temperature` on mean what the flags of their names do."""

    episodes_per_batch: int  # that one device answers at a time, each with its samples
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_completion_length: int = 0
    max_pixels: int | None = None  # budget of one image
    allow_reasoning: bool = False
    max_turns: int = 1
    max_context: int | None = None  # tokens of a conversation; None for as many as the model has positions
    seed: int = 0  # of samples


class ModelPolicy:
    """Answers episodes with a model; a figures.Policy. Every process takes part, and every one gets all answers."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: AnswerSettings,
        *,
        env: EpisodeSource | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        on_progress: Callable[[int], object] = lambda num_rows: None,
        most_of_ranks: Callable[[int], int] = lambda count: count,
    ):
        """model: unwrapped, on its device, in eval mode. env: whose tools answer, where rollouts have several turns.

        on_progress: called with each number of rows newly done. most_of_ranks: of tree_sampling.sample_on_trees, where
        weights are sharded.
        """
        self.model, self.processor, self.settings, self.env = model, processor, settings, env
        self.rank, self.num_ranks, self.on_progress = rank, num_ranks, on_progress
        self.most_of_ranks, self._memory = most_of_ranks, DraftMemory()
        self._greedy_answers: dict[tuple[str, ...], Answers] = {}
        self._open = lru_cache(maxsize=1024)(lambda path: open_image(path, settings.max_pixels))

    def __call__(self, episodes: Sequence[Episode], num_samples: int) -> list[Answers]:
        """One greedy answer and `num_samples` samples of each episode, in order."""
        # what tools answer depends on more of an episode than its prompt
        if num_samples or self.settings.max_turns > 1:
            return self._answer(episodes, num_samples)
        # greedy answers to one prompt are one answer: with blank pictures, prompts differ in their instruction alone
        keys = [self._prompt_key(episode) for episode in episodes]
        new = {key: episode for key, episode in zip(keys, episodes, strict=True) if key not in self._greedy_answers}
        self._greedy_answers |= zip(new, self._answer(list(new.values()), 0), strict=True)
        self.on_progress(len(episodes) - len(new))
        return [self._greedy_answers[key] for key in keys]

    def _answer(self, episodes: Sequence[Episode], num_samples: int) -> list[Answers]:
        size = self.settings.episodes_per_batch
        # under ZeRO-3 every rank must generate as often as the others: the last ones may answer an episode again
        per_rank = -(-len(episodes) // self.num_ranks)
        own = [(number * self.num_ranks + self.rank) % len(episodes) for number in range(per_rank)]
        collator = VLMDataCollator(self.processor, 1 + num_samples)
        answered: list[tuple[int, Answers]] = []
        for start in range(0, len(own), size):
            numbers = own[start : start + size]
            texts = self._answer_batch({number: episodes[number] for number in numbers}, num_samples, collator)
            answered += zip(numbers, texts, strict=True)
            self.on_progress(min(self.num_ranks * len(numbers), len(episodes)) * (1 + num_samples))
        by_number = dict(gather_object(answered))
        return [by_number[number] for number in range(len(episodes))]

    def _answer_batch(self, episodes: dict[int, Episode], num_samples: int, collator: VLMDataCollator) -> list[Answers]:
        group_size = 1 + num_samples
        # the collator knows a batch by its episodes' numbers
        firsts = [episode_row(episode, number, self._pictures(episode)) for number, episode in episodes.items()]
        batch = send_to_device(collator([row for row in firsts for _ in range(group_size)]), self.model.device)
        settings, ends = self.settings, end_token_ids(self.model)
        temperature = settings.temperature if num_samples else 0.0
        config = answer_config(
            self.model,
            settings.max_completion_length,
            temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            min_completion_length=settings.min_completion_length,
        )
        rules = SamplingRules(config)
        answers = self._tool_answers(batch)
        request = SamplingRequest(
            rules,
            named_uniforms(settings.seed, 0, batch["numbers"], group_size, settings.max_turns * rules.max_tokens),
            # what this model said before is what it may say again
            [within_budget(self._memory.drafts()) for _ in episodes],
            padding_id=config.pad_token_id,
            num_greedy=1,
            answers=answers,
            turn_end_id=self.processor.tokenizer.convert_tokens_to_ids(TURN_END),
        )
        with torch.no_grad():
            found = sample_batch(self.model, batch, None, request, most_of_ranks=self.most_of_ranks)
        rollouts = [turns for samples in found for turns in samples.turns]
        turns = [ids for of_rollout in rollouts for ids in of_rollout]
        self._memory.add([ids for ids in turns if ids[-1] in ends], len(turns), 0.0)
        texts = [tuple(map(self._text_of, of_rollout)) for of_rollout in rollouts]
        said: list[Said] = list(texts) if answers else [text for (text,) in texts]
        starts = range(0, len(said), group_size)
        return [Answers(said[start], tuple(said[start + 1 : start + group_size])) for start in starts]

    def _tool_answers(self, batch: EpisodeBatch) -> ToolAnswers | None:
        settings = self.settings
        if self.env is None:
            assert settings.max_turns == 1, "several turns need an environment whose tools answer"
            return None
        turns = TurnSettings(
            settings.max_turns,
            settings.max_completion_length,
            settings.max_context,
            settings.max_pixels,
            settings.allow_reasoning,
        )
        return tool_answers(self.env, batch, self.model, self.processor, self._text_of, turns)

    def _text_of(self, ids: Sequence[int]) -> str:
        return decode_completion(self.processor, ids, end_token_ids(self.model))

    def _prompt_key(self, episode: Episode) -> tuple[str, ...]:
        """Equal for episodes whose messages are the same and whose pictures have the same pixels or files."""
        key = [image_digest(image).hex() if isinstance(image, Image.Image) else str(image) for image in episode.images]
        return (json.dumps(episode.messages), *key)

    def _pictures(self, episode: Episode) -> list[Image.Image]:
        budget, images = self.settings.max_pixels, episode.images
        return [open_image(image, budget) if isinstance(image, Image.Image) else self._open(image) for image in images]


def sound_part(plan: EvaluationPlan, *, rank: int, num_ranks: int, skips_bad_images: bool) -> EvaluationPlan:
    """The plan without the episodes of which an image has gone bad since it was checked. Every process takes part.

    Each opens the images of its share of the episodes. Raises RunStopped on all of them for a bad image, unless bad
    images are skipped and an episode is left.
    """

    # a file is opened once, however many episodes show it
    @cache
    def problem_of(path: Path) -> str | None:
        try:
            open_image(path, plan.max_pixels)
        except BadImage as error:
            return str(error)
        return None

    faults = {}
    for number in range(rank, len(plan.episodes), num_ranks):
        paths = [image for image in plan.episodes[number].images if not isinstance(image, Image.Image)]
        problem = next(filter(None, map(problem_of, paths)), None)
        if problem is not None:
            faults[number] = f"process {rank}: held-out episode {number}: {problem}"
    found = {number: fault for rank_faults in gather_object([faults]) for number, fault in rank_faults.items()}
    if not found:
        return plan
    first = found[min(found)]
    if not skips_bad_images or len(found) == len(plan.episodes):
        raise RunStopped(first)
    logger.info(f"{len(found)} of {len(plan.episodes)} held-out episodes are left out of this evaluation: {first}")
    rest = tuple(episode for number, episode in enumerate(plan.episodes) if number not in found)
    return replace(plan, episodes=rest)
