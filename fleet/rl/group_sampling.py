"""GroupSampling: image features and completions from the policy, and what its next passes need to know of them.

Completions are drawn on the groups' trees of tokens (fleet/qwen), by TRL's own generation, or by vLLM. The only code
that leans on how TRL samples. Knows no reward and no loss.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import RLOOConfig
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation

from dataset import EpisodeBatch, prompts_of_rollouts, repeat_episodes
from fleet.qwen.drafts import DraftMemory, Drafts, within_budget
from fleet.qwen.draws import named_uniforms
from fleet.qwen.flops import add_up, compare_work
from fleet.qwen.group_passes import (
    base_qwen,
    encode_image,
    tree_prompts,
    why_not_to_pack,
)
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import Branches, Prompts, lay_out
from fleet.qwen.tree_sampling import Samples, SamplingRequest, sample_batch
from fleet.qwen.vision_cache import VisionCache
from fleet.rl.first_pass import as_wide_as, scores_of_first_pass, why_not_one_pass
from fleet.rl.resumable_trainer import ResumableTrainer
from fleet.rl.rollouts import length_metrics
from fleet.rl.settings import TrainerSettings
from fleet.rl.vllm_sampling import VLLMSampler, sampling_kwargs
from model_utils import end_token_ids, media_token_ids

logger = logging.getLogger("fleet")

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.

# the name under which the trainer's saved state has the draft memory
MEMORY_NAME = "FleetDraftMemory"


@dataclass(frozen=True)
class Drawn:
    """The completions of one generation as a sampler drew them."""

    completion_ids: list[list[int]]  # B
    logps: list[list[float]] | None = None  # B; of each token under the distribution that it was drawn from
    samples: Samples | None = None  # where they were drawn on trees, in one piece


@dataclass(frozen=True)
class SampledGroups:
    """This device's completions of one generation, P whole groups of G, ready to be scored."""

    batch: EpisodeBatch
    completion_ids: list[list[int]]  # B, never empty
    completion_ids_BT: Tensor  # int64, right-padded
    completion_mask_BT: Tensor  # int64, 0 on padding and on masked truncated completions
    sampler_logps: list[list[float]] | None  # B; of each token under the distribution drawn from; NaN where unknown
    prompts: Prompts
    branches: list[Branches]  # P; of the completions that are not masked
    nodes: list[list[list[int]]]  # P x G; of each of their tokens
    image_features: list[Tensor] | None  # one an image from the vision cache, or None for the encoder to run
    is_packed: bool  # a forward pass has each group as one row
    first_scores: tuple[Tensor, Tensor] | None  # (B, T) log-probabilities, with gradient, and entropies of round 1

    def rows_of(self, groups: slice) -> slice:
        """The rollouts of these groups among the B."""
        return slice(groups.start * self.batch["group_size"], groups.stop * self.batch["group_size"])


class GroupSampling(ResumableTrainer):
    """TRL's trainer, whose samples are Fleet's."""

    def __init__(
        self, *, model: PreTrainedModel, args: RLOOConfig, processing_class: Any, settings: TrainerSettings, **rest: Any
    ):
        """rest: RLOOTrainer's other parameters. Image and video tokens are never sampled.

        Raises ValueError if `args` asks of generation what sampling on trees does not do.
        """
        media_ids = media_token_ids(model.config)
        banned = sampling_kwargs(media_ids, end_token_ids(model)) if args.use_vllm else {"suppress_tokens": media_ids}
        args.generation_kwargs = banned | (args.generation_kwargs or {})
        super().__init__(model=model, args=args, processing_class=processing_class, **rest)
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
        self._told: set[str] = set()
        self._share_ended_in_first = 0.0  # of the latest generation's rollouts, over all devices

    @property
    def _groups_per_step(self) -> int:
        return self.args.per_device_train_batch_size // self.num_generations

    def _tell_once(self, kind: str, message: str) -> None:
        """Logs a message, unless one of its kind was logged before."""
        if kind not in self._told:
            logger.info(f"{message} (said once)")
            self._told.add(kind)

    def _add_metrics(self, figures: Mapping[str, float]) -> None:
        """Adds figures, which are the same on every process, to those that the next log averages."""
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    def _sample(self, batch: EpisodeBatch, guesses: Sequence[Sequence[str]]) -> SampledGroups:
        """G completions of each episode, with the inputs of their scoring passes. Every rank takes part.

        guesses: of each episode, completions that its environment thinks likely.
        """
        features = self._image_features(batch)
        drawn = self._draw(batch, features, guesses)
        completion_ids = self._usable(drawn.completion_ids)
        logps = None if drawn.logps is None else _as_long_as(completion_ids, drawn.logps)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        is_ended = [ids[-1] in ends for ids in completion_ids]
        self._log_lengths(batch, completion_ids, is_ended)
        device = self.accelerator.device
        rows = [torch.tensor(ids) for ids in completion_ids]
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id).to(device)
        mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        if self.mask_truncated_completions:
            mask_BT = mask_BT * torch.tensor(is_ended, device=device).unsqueeze(1)
        prompts = tree_prompts(self.accelerator.unwrap_model(self.model), batch)
        branches, nodes = self._trees(completion_ids, mask_BT)
        is_packed = self._chooses_packing(batch, mask_BT, branches)
        first_scores = None
        if drawn.samples is not None and is_packed:
            first_scores = self._first_scores(prompts, branches, nodes, drawn.samples)
            with torch.enable_grad():
                first_scores = None if first_scores is None else as_wide_as(ids_BT, *first_scores)
        return SampledGroups(
            batch,
            completion_ids,
            completion_ids_BT=ids_BT,
            completion_mask_BT=mask_BT,
            sampler_logps=logps,
            prompts=prompts,
            branches=branches,
            nodes=nodes,
            image_features=features,
            is_packed=is_packed,
            first_scores=first_scores,
        )

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

    def _draw(self, batch: EpisodeBatch, features: list[Tensor] | None, guesses: Sequence[Sequence[str]] = ()) -> Drawn:
        """B completions as token ids, each up to and with its first end token."""
        if self.vllm is not None:
            return Drawn(*self.vllm.sample(batch, self.state.global_step))
        if not self.draws_on_trees:
            rows = repeat_episodes(batch, 0, len(batch["episodes"]))
            fields = {key: rows[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
            return Drawn(self._generate_single_turn(*prompts_of_rollouts(batch), fields))
        return self._draw_on_trees(batch, features, self._drafts(batch, guesses))

    def _drafts(self, batch: EpisodeBatch, guesses: Sequence[Sequence[str]]) -> Drafts:
        """What may be said behind each prompt: the environment's guesses, then what the run's policy says most."""
        remembered = self.draft_memory.drafts()
        encoded = [
            [self._tokenizer(text)["input_ids"] for text in texts] for texts in guesses or [()] * len(batch["episodes"])
        ]
        ended = [[[*ids, self.eos_token_ids[0]] for ids in group] for group in encoded]
        return [within_budget([*group, *remembered]) for group in ended]

    def _draw_on_trees(self, batch: EpisodeBatch, features: list[Tensor] | None, drafts: Drafts) -> Drawn:
        rules = SamplingRules(self.generation_config)
        size = self.num_generations
        names = self.args.seed, self.state.global_step, batch["numbers"]
        uniforms_PGT = named_uniforms(*names, num_rollouts=size, num_places=rules.max_tokens)
        request = SamplingRequest(
            rules,
            uniforms_PGT,
            drafts,
            padding_id=self._tokenizer.pad_token_id,
            num_greedy=0 if rules.config.do_sample else size,
        )
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            self.accelerator.autocast(),
        ):
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
        )

    def _most_of_ranks(self, count: int) -> int:
        """The maximum over the processes, where these must do the same passes together."""
        if not is_deepspeed_zero3_enabled() or self.args.ds3_gather_for_generation:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

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

    def _first_scores(
        self, prompts: Prompts, branches: list[Branches], nodes: list[list[list[int]]], samples: Samples
    ) -> tuple[Tensor, Tensor] | None:
        """Log-probabilities, with gradient, and entropies (B, T) from the pass that all completions were drawn in.

        None if that pass had no gradients, or a rollout of any process went on after it.
        """
        first = samples.first
        is_trained_on = first is not None and first.logits_PKV.requires_grad and self._share_ended_in_first == 1.0
        if self._why_not_one_pass() is None:
            self._add_metrics({"sampling/one_pass": float(is_trained_on)})
        if not is_trained_on:
            return None
        tree = lay_out(prompts, branches, nodes, padding_id=self._tokenizer.pad_token_id)
        return scores_of_first_pass(samples, branches, tree, self.temperature)

    def _trees(
        self, completion_ids: Sequence[Sequence[int]], mask_BT: Tensor
    ) -> tuple[list[Branches], list[list[list[int]]]]:
        """The P trees of the completions that are not masked, and the nodes of each rollout's tokens."""
        paths = [ids if is_kept else [] for ids, is_kept in zip(completion_ids, mask_BT[:, 0].tolist(), strict=True)]
        branches = [Branches() for _ in range(len(paths) // self.num_generations)]
        nodes = [branches[place // self.num_generations].add(path) for place, path in enumerate(paths)]
        size = self.num_generations
        return branches, [nodes[first : first + size] for first in range(0, len(nodes), size)]

    def _usable(self, completion_ids: list[list[int]]) -> list[list[int]]:
        """Each completion up to its first media token, which a sampler is told never to draw; an end if empty."""
        usable = []
        for ids in completion_ids:
            stop = next((place for place, token in enumerate(ids) if token in self._media_ids), len(ids))
            usable.append(ids[:stop] or [self.eos_token_ids[0]])
        return usable

    def _log_lengths(self, batch: EpisodeBatch, completion_ids: list[list[int]], is_ended: list[bool]) -> None:
        """Logs TRL's metrics of completion lengths, over all devices, and of tokens seen since the start."""
        num_prompt_tokens = int(batch["attention_mask"].sum()) * batch["group_size"]
        by_rank = gather_object([(num_prompt_tokens, [len(ids) for ids in completion_ids], is_ended)])
        lengths = [length for _, rank_lengths, _ in by_rank for length in rank_lengths]
        self.state.num_input_tokens_seen += sum(num_tokens for num_tokens, _, _ in by_rank) + sum(lengths)
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        are_ended = [has_end for _, _, rank_are_ended in by_rank for has_end in rank_are_ended]
        self._add_metrics(length_metrics(lengths, are_ended))

    def _chooses_packing(self, batch: EpisodeBatch, mask_BT: Tensor, branches: Sequence[Branches]) -> bool:
        """True if this generation's passes have each group as one row; decided on the work of all devices."""
        if not self.settings.shared_prefix:
            return False
        own = compare_work(
            self.model.config,
            batch["attention_mask"].sum(dim=1).tolist(),
            [(sum(map(bool, group.children[1:])), len(group) - 1) for group in branches],
            group_size=self.num_generations,
            padded_lengths=(batch["input_ids"].shape[1], mask_BT.shape[1]),
            grids_thw=batch["image_grid_thw"].tolist(),
            are_features_known=self.vision_cache is not None,
            groups_per_step=self._groups_per_step,
        )
        work = add_up(gather_object([own]))
        reason = why_not_to_pack(self._attention, work)
        if reason is not None:
            self._tell_once("unpacked", f"shared prefix: this generation is trained on as TRL does it: {reason}")
        self._add_metrics({"token_ratio": work.unpacked_tokens / work.packed_tokens if reason is None else 1.0})
        return reason is None


def _as_long_as(completion_ids: Sequence[Sequence[int]], logps: Sequence[Sequence[float]]) -> list[list[float]]:
    """The log-probabilities of the tokens that are left of each completion; NaN for an end that was put there."""
    return [
        [*known[: len(ids)], *[math.nan] * (len(ids) - len(known))]
        for ids, known in zip(completion_ids, logps, strict=True)
    ]
