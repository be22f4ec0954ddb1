"""Drawing: the completions of one generation, and what is remembered of them as drafts of the next.

They are drawn on the groups' trees of tokens (fleet/qwen), by TRL's own generation, or by vLLM. The only code that
leans on how TRL samples. Knows no reward and no loss.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import RLOOConfig
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation

from dataset import EpisodeBatch, prompts_of_rollouts, repeat_episodes
from fleet.processes import most_of_ranks
from fleet.qwen.drafts import MAX_DRAFT_TOKENS, DraftMemory, Drafts, within_budget
from fleet.qwen.draws import named_uniforms
from fleet.qwen.group_passes import MAX_MASK_PAIRS, base_qwen, encode_image
from fleet.qwen.observations import TURN_END
from fleet.qwen.sampling_pieces import sample_batch
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import PathToken
from fleet.qwen.tool_answers import ToolAnswers
from fleet.qwen.tree_sampling import Samples, SamplingRequest
from fleet.qwen.vision_cache import VisionCache
from fleet.rl.first_pass import why_not_one_pass
from fleet.rl.settings import TrainerSettings
from fleet.rl.vision_rate import VisionRate
from fleet.rl.vllm_sampling import VLLMSampler, require_dtype, sampling_kwargs
from model_utils import end_token_ids, media_token_ids

logger = logging.getLogger("fleet")

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group.

# the name under which the trainer's saved state has the draft memory
MEMORY_NAME = "FleetDraftMemory"


@dataclass(frozen=True)
class Drawn:
    """The completions of one generation as a sampler drew them."""

    completion_ids: list[list[int]]  # B
    logps: list[list[float]] | None = None  # B; of each token under the distribution that it was drawn from
    samples: Samples | None = None  # where they were drawn on trees, in one piece
    turn_lengths: list[list[int]] | None = None  # B; of each turn, where there may be several
    paths: list[list[PathToken]] | None = None  # B; with what was given between turns


class Drawing(VisionRate):
    """TRL's trainer, whose completions are drawn by Fleet."""

    def __init__(
        self, *, model: PreTrainedModel, args: RLOOConfig, processing_class: Any, settings: TrainerSettings, **rest: Any
    ):
        """rest: RLOOTrainer's other parameters. Image and video tokens are never sampled.

        Raises ValueError if `args` asks of generation what sampling on trees does not do.
        """
        media_ids = media_token_ids(model.config)
        banned = sampling_kwargs(media_ids, end_token_ids(model)) if args.use_vllm else {"suppress_tokens": media_ids}
        args.generation_kwargs = banned | (args.generation_kwargs or {})
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            vision_learning_rate=settings.vision_learning_rate,
            **rest,
        )
        policy = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled:
            # loading under ZeRO-3 notes renamings that matched no weight, and saving would undo those as well
            # ("model.model.layers"); without the note, saving gives the hub's names
            policy._weight_conversions = None
        if args.beta == 0.0 and "ref" in getattr(self.model, "peft_config", {}):
            # TRL's copy of an adapter that training goes on from, which only a KL term would read
            self.model.delete_adapter("ref")
        self.settings = settings
        self.vision_cache: VisionCache | None = None
        if settings.vision_cache_bytes and settings.shared_prefix:
            self.vision_cache = VisionCache(policy, settings.vision_cache_bytes)
        self.vllm: VLLMSampler | None = None
        if args.use_vllm:
            require_dtype(self.vllm_generation, torch.bfloat16 if args.bf16 else torch.float32)
            self.vllm = VLLMSampler(self.vllm_generation, processing_class, settings.vllm_max_logprob_gap)
        self.draws_on_trees = settings.shared_prefix and self.vllm is None
        if self.draws_on_trees:
            SamplingRules(self.generation_config)
        if self.ref_model is not None:
            # TRL loads it as transformers does
            vision = base_qwen(policy).config.vision_config._attn_implementation
            self.accelerator.unwrap_model(self.ref_model).set_attn_implementation({"vision_config": vision})
        self._media_ids = set(media_ids)
        self._attention = base_qwen(policy).config.get_text_config()._attn_implementation
        if settings.max_turns > 1 and not (self.draws_on_trees and self._attention in MAX_MASK_PAIRS):
            raise ValueError(
                f"max_turns={settings.max_turns} needs sampling behind a shared prompt, in Fleet's own loop; drop "
                "use_vllm, shared_prefix false and flash attention"
            )
        self._told: set[str] = set()
        self._share_ended_in_first = 0.0  # of the latest generation's rollouts, over all devices

    def _tell_once(self, kind: str, message: str) -> None:
        """Logs a message, unless one of its kind was logged before."""
        if kind not in self._told:
            logger.info(f"{message} (said once)")
            self._told.add(kind)

    def _add_metrics(self, figures: Mapping[str, float]) -> None:
        """Adds figures, which are the same on every process, to those that the next log averages."""
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    def _image_features(self, batch: EpisodeBatch) -> list[Tensor] | None:
        """The features of the batch's images from the vision cache, in host memory; None without a cache."""
        cache, digests = self.vision_cache, batch["image_digests"]
        if cache is None:
            return None
        policy = self.accelerator.unwrap_model(self.model)
        # under ZeRO-3 the encoder's weights are gathered by all ranks, so all call it equally often
        num_unknown_by_rank = gather_object([len(cache.unknown_places(digests))])
        with (
            self.accelerator.autocast(),
            disable_gradient_checkpointing(policy, self.args.gradient_checkpointing_kwargs),
        ):
            features = cache.features_of(
                digests, lambda place: encode_image(policy, batch, place), num_calls=max(num_unknown_by_rank)
            )
        num_images = sum(gather_object([len(digests)]))
        self._add_metrics({"vision_cache/hit_rate": 1 - sum(num_unknown_by_rank) / num_images})
        return features

    def _draw(
        self,
        batch: EpisodeBatch,
        features: list[Tensor] | None,
        guesses: Sequence[Sequence[str]] = (),
        answers: ToolAnswers | None = None,
    ) -> Drawn:
        """B completions as token ids, each turn up to and with its first end token. answers: None for one turn."""
        if self.vllm is not None:
            return Drawn(*self.vllm.sample(batch, self.state.global_step))
        if not self.draws_on_trees:
            rows = repeat_episodes(batch, 0, len(batch["episodes"]))
            fields = {key: rows[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
            return Drawn(self._generate_single_turn(*prompts_of_rollouts(batch), fields))
        return self._draw_on_trees(batch, features, self._drafts(batch, guesses), answers)

    def _drafts(self, batch: EpisodeBatch, guesses: Sequence[Sequence[str]]) -> Drafts:
        """What may be said behind each prompt: the environment's guesses, then what the run's policy says most."""
        remembered = self.draft_memory.drafts()
        encoded = [
            [self._tokenizer(text)["input_ids"] for text in texts] for texts in guesses or [()] * len(batch["episodes"])
        ]
        ended = [[[*ids, self.eos_token_ids[0]] for ids in group] for group in encoded]
        # the pass that is trained on may be this one, and is to hold no more than one over the rollouts
        longest = self.settings.max_turns * int(self.generation_config.max_new_tokens)
        max_nodes = min(MAX_DRAFT_TOKENS, self.num_generations * (longest - 1))
        return [within_budget([*group, *remembered], max_nodes) for group in ended]

    def _draw_on_trees(
        self, batch: EpisodeBatch, features: list[Tensor] | None, drafts: Drafts, answers: ToolAnswers | None
    ) -> Drawn:
        rules = SamplingRules(self.generation_config)
        size, num_places = self.num_generations, self.settings.max_turns * rules.max_tokens
        names = self.args.seed, self.state.global_step, batch["numbers"]
        uniforms_PGT = named_uniforms(*names, num_rollouts=size, num_places=num_places)
        request = SamplingRequest(
            rules,
            uniforms_PGT,
            drafts,
            padding_id=self._tokenizer.pad_token_id,
            num_greedy=0 if rules.config.do_sample else size,
            answers=answers,
            turn_end_id=self._tokenizer.convert_tokens_to_ids(TURN_END),
        )
        with self._policy_that_samples() as policy:
            found = sample_batch(
                policy,
                batch,
                features,
                request,
                most_of_ranks=self._most_of_ranks,
                model_of_first_pass=self.model_wrapped if self._tries_one_pass() else None,
            )
        self._log_sampling(found)
        return Drawn(
            [ids for samples in found for ids in samples.completion_ids],
            [logps for samples in found for logps in samples.logps],
            found[0] if len(found) == 1 else None,
            turn_lengths=[lengths for samples in found for lengths in samples.turn_lengths],
            paths=[path for samples in found for path in samples.paths],
        )

    @contextlib.contextmanager
    def _policy_that_samples(self) -> Iterator[Any]:
        """The policy, unwrapped, for sampling in the run's precision; under ZeRO-3 whole where that was asked for."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            self.accelerator.autocast(),
        ):
            yield policy

    def _most_of_ranks(self, count: int) -> int:
        """The maximum over the processes, where these must do the same passes together.

        With gathered weights too: a hook that TRL leaves in place compares the processes' traces of modules.
        """
        return most_of_ranks(self.accelerator, count) if is_deepspeed_zero3_enabled() else count

    @property
    def draft_memory(self) -> DraftMemory:
        """What the policy says most; part of the trainer's saved state."""
        saved = self.state.stateful_callbacks.get(MEMORY_NAME)
        return DraftMemory() if saved is None else DraftMemory.from_json(saved)

    def remember(self, completion_ids: Sequence[Sequence[int]]) -> None:
        """Takes a generation's completions, of all processes, into the draft memory."""
        if self.draws_on_trees:
            memory, ends = self.draft_memory, set(self.eos_token_ids)
            ended = [ids for ids in completion_ids if ids[-1] in ends]
            memory.add(ended, len(completion_ids), self._share_ended_in_first)
            self.state.stateful_callbacks[MEMORY_NAME] = memory.as_json()

    def _log_sampling(self, found: Sequence[Samples]) -> None:
        """Logs how the completions of all devices came about."""
        own = [(samples.num_ended_in_first, len(samples.completion_ids), samples.num_passes) for samples in found]
        all_found = [counts for of_rank in gather_object([own]) for counts in of_rank]
        ended, totals, passes = zip(*all_found, strict=True)
        self._share_ended_in_first = sum(ended) / sum(totals)
        self._add_metrics(
            {
                "sampling/ended_in_first_pass": self._share_ended_in_first,
                "sampling/passes": float(max(passes)) * len(found),
            }
        )

    def _why_not_one_pass(self) -> str | None:
        """The reason why sampling's first pass cannot be the one that is trained on; None if it can."""
        if self.settings.max_turns > 1:
            return "rollouts have several turns"
        if self.settings.dynamic_sampling:
            return "groups may be replaced"
        return why_not_one_pass(self.args, self.accelerator.unwrap_model(self.model), self._attention)

    def _tries_one_pass(self) -> bool:
        """True if round 1 of sampling is run with gradients, in the hope that all rollouts end in it.

        The hope goes by the generation before: at most one of its rollouts went on.
        """
        reason = self._why_not_one_pass()
        if reason is not None:
            self._tell_once("two passes", f"each generation is sampled in one pass and trained on in another: {reason}")
            return False
        num_rollouts = self.accelerator.num_processes * self.args.per_device_train_batch_size
        return round((1 - self.draft_memory.share_ended_in_first) * num_rollouts) <= 1
