"""PolicyPasses: image features, completions, log-probabilities and answers, from the policy and its reference.

A pass takes whole groups behind one copy of their prompt (fleet/qwen), or TRL's rows, one prompt a rollout. vLLM may
draw the completions instead. The only code that leans on how TRL samples and scores. Knows no reward and no loss.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl import RLOOConfig
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from dataset import EpisodeBatch, prompts_of_rollouts, repeat_episodes
from fleet.evaluation.answering import AnswerSettings, ModelPolicy, sound_part
from fleet.evaluation.figures import EvaluationPlan, evaluate
from fleet.qwen.flops import add_up, compare_work
from fleet.qwen.group_passes import (
    base_qwen,
    encode_image,
    generate_groups,
    image_inputs,
    prompt_positions,
    score_packed,
    takes_image_features,
    why_not_to_pack,
)
from fleet.qwen.shared_prefix import pack_groups, unpack
from fleet.qwen.vision_cache import VisionCache
from fleet.rl.resumable_trainer import ResumableTrainer
from fleet.rl.rollouts import length_metrics
from fleet.rl.settings import TrainerSettings
from fleet.rl.vllm_sampling import VLLMSampler, sampling_kwargs
from model_utils import end_token_ids, media_token_ids, up_to_end

logger = logging.getLogger("fleet")

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


@dataclass(frozen=True)
class SampledGroups:
    """This device's completions of one generation, P whole groups of G, ready to be scored."""

    batch: EpisodeBatch
    completion_ids: list[list[int]]  # B, never empty
    completion_ids_BT: Tensor  # int64, right-padded
    completion_mask_BT: Tensor  # int64, 0 on padding and on masked truncated completions
    sampler_logps_BT: Tensor | None  # float32, of vLLM; NaN where it gave none, and on padding
    positions_3PL: Tensor  # int64, the model's positions of the prompts
    image_features: list[Tensor] | None  # one an image from the vision cache, or None for the encoder to run
    is_packed: bool  # a forward pass has each group as one row

    def rows_of(self, groups: slice) -> slice:
        """The rollouts of these groups among the B."""
        return slice(groups.start * self.batch["group_size"], groups.stop * self.batch["group_size"])


class PolicyPasses(ResumableTrainer):
    """TRL's trainer, whose samples and scores are Fleet's."""

    def __init__(
        self, *, model: PreTrainedModel, args: RLOOConfig, processing_class: Any, settings: TrainerSettings, **rest: Any
    ):
        """rest: RLOOTrainer's other parameters. Image and video tokens are never sampled."""
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
        if settings.vision_cache_bytes and not takes_image_features():
            logger.info("this transformers takes no image features, so every pass encodes its images; 5.18 takes them")
        elif settings.vision_cache_bytes and settings.shared_prefix:
            self.vision_cache = VisionCache(policy, settings.vision_cache_bytes)
        self.vllm: VLLMSampler | None = None
        if args.use_vllm:
            self.vllm = VLLMSampler(self.vllm_generation, processing_class, settings.vllm_max_logprob_gap)
        self._media_ids = set(media_ids)
        self._attention = base_qwen(policy).config.get_text_config()._attn_implementation
        self._has_told_why_not_packed = False

    @property
    def _groups_per_step(self) -> int:
        return self.args.per_device_train_batch_size // self.num_generations

    def _add_metrics(self, figures: Mapping[str, float]) -> None:
        """Adds figures, which are the same on every process, to those that the next log averages."""
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    def _sample(self, batch: EpisodeBatch) -> SampledGroups:
        """G completions of each episode, with the inputs of their scoring passes. Every rank takes part."""
        features, sampler_logps = self._image_features(batch), None
        if self.vllm is None:
            completion_ids = self._sample_completion_ids(batch, features)
        else:
            completion_ids, sampler_logps = self.vllm.sample(batch, self.state.global_step)
        completion_ids = self._usable(completion_ids)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        is_ended = [ids[-1] in ends for ids in completion_ids]
        self._log_lengths(batch, completion_ids, is_ended)
        device = self.accelerator.device
        rows = [torch.tensor(ids) for ids in completion_ids]
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id).to(device)
        mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        if self.mask_truncated_completions:
            mask_BT = mask_BT * torch.tensor(is_ended, device=device).unsqueeze(1)
        return SampledGroups(
            batch,
            completion_ids,
            completion_ids_BT=ids_BT,
            completion_mask_BT=mask_BT,
            sampler_logps_BT=None if sampler_logps is None else _padded_logps(sampler_logps, ids_BT),
            positions_3PL=prompt_positions(self.accelerator.unwrap_model(self.model), batch),
            image_features=features,
            is_packed=self._chooses_packing(batch, mask_BT),
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

    def _sample_completion_ids(self, batch: EpisodeBatch, features: list[Tensor] | None) -> list[list[int]]:
        """B completions as token ids, each up to and with its first end token."""
        if not self.settings.shared_prefix:
            rows = repeat_episodes(batch, 0, len(batch["episodes"]))
            fields = {key: rows[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
            return self._generate_single_turn(*prompts_of_rollouts(batch), fields)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as policy:
            sampled = generate_groups(policy, batch, features, self.generation_config).tolist()
        return [up_to_end(ids, self.eos_token_ids) for ids in sampled]

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

    def _chooses_packing(self, batch: EpisodeBatch, mask_BT: Tensor) -> bool:
        """True if this generation's passes have each group as one row; decided on the work of all devices."""
        if not self.settings.shared_prefix:
            return False
        own = compare_work(
            self.model.config,
            batch["attention_mask"].sum(dim=1).tolist(),
            mask_BT.sum(dim=1).view(-1, self.num_generations).tolist(),
            padded_lengths=(batch["input_ids"].shape[1], mask_BT.shape[1]),
            grids_thw=batch["image_grid_thw"].tolist(),
            are_features_known=self.vision_cache is not None,
            groups_per_step=self._groups_per_step,
        )
        work = add_up(gather_object([own]))
        reason = why_not_to_pack(self._attention, work)
        if reason is not None and not self._has_told_why_not_packed:
            logger.info(f"shared prefix: this generation is trained on as TRL does it: {reason} (said once)")
            self._has_told_why_not_packed = True
        self._add_metrics({"token_ratio": work.unpacked_tokens / work.packed_tokens if reason is None else 1.0})
        return reason is None

    def _score_reference(self, sampled: SampledGroups) -> Tensor:
        """The completions' log-probabilities (B, T) under the reference: another model, or this one's base."""
        if self.ref_model is not None:
            return self._score(self.ref_model, sampled)
        # TRL keeps a copy of an adapter that training began with as "ref"; a new one begins at zero, as the bare base
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._score(self.model, sampled)

    @torch.no_grad()
    def _score(self, model: nn.Module, sampled: SampledGroups) -> Tensor:
        """The completions' log-probabilities (B, T) under a model, as many groups at a time as a step has."""
        size = self._groups_per_step
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            parts = [
                self._completion_logps(model, sampled, slice(first, first + size))[0]
                for first in range(0, len(sampled.batch["episodes"]), size)
            ]
        return torch.cat(parts)

    def _completion_logps(
        self, model: nn.Module, sampled: SampledGroups, groups: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies (b, T) of these groups' completion tokens, from one forward pass."""
        if not sampled.is_packed:
            return self._logps_of_rows(model, sampled, groups)
        batch, rows = sampled.batch, sampled.rows_of(groups)
        ids_BT, mask_BT = sampled.completion_ids_BT[rows], sampled.completion_mask_BT[rows]
        packed = pack_groups(
            batch["input_ids"][groups],
            batch["attention_mask"][groups],
            sampled.positions_3PL[:, groups],
            ids_BT.view(-1, batch["group_size"], ids_BT.shape[1]),
            mask_BT.sum(dim=1).view(-1, batch["group_size"]),
            self._tokenizer.pad_token_id,
        )
        images = image_inputs(batch, groups, sampled.image_features)
        with self.accelerator.autocast():
            logps_PS, entropies_PS = score_packed(model, packed, images, self._attention)
        logps_BT = unpack(logps_PS, packed).flatten(0, 1)
        return logps_BT, None if entropies_PS is None else unpack(entropies_PS, packed).flatten(0, 1)

    def _logps_of_rows(self, model: nn.Module, sampled: SampledGroups, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies from TRL's own pass, which has a prompt for each rollout."""
        rows = sampled.rows_of(groups)
        ids_BT, mask_BT = sampled.completion_ids_BT[rows], sampled.completion_mask_BT[rows]
        prompts = repeat_episodes(sampled.batch, groups.start, groups.stop)
        logps_BT, entropies_BT, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompts["prompt_ids"], ids_BT], dim=1),
            torch.cat([prompts["prompt_mask"], mask_BT], dim=1),
            ids_BT.shape[1],
            compute_entropy=torch.is_grad_enabled(),
            pixel_values=prompts["pixel_values"],
            image_grid_thw=prompts["image_grid_thw"],
            num_images=prompts["num_images"],
            # completions hold no image tokens
            mm_token_type_ids=torch.cat([prompts["mm_token_type_ids"], torch.zeros_like(ids_BT)], dim=1),
        )
        return logps_BT, entropies_BT

    def _compare_with_vllm(self, sampled: SampledGroups, groups: slice, old_logps_BT: Tensor) -> None:
        """Compares these groups' log-probabilities with those that vLLM sampled with. Every rank takes part."""
        if self.vllm is None or sampled.sampler_logps_BT is None:
            return
        rows, is_last = sampled.rows_of(groups), groups.stop == len(sampled.batch["episodes"])
        sampler_BT, mask_BT = sampled.sampler_logps_BT[rows], sampled.completion_mask_BT[rows]
        self._add_metrics(self.vllm.compare(old_logps_BT, sampler_BT, mask_BT, is_last=is_last))

    def _answer(self, plan: EvaluationPlan, settings: AnswerSettings) -> dict[str, Any]:
        """The figures of the policy's answers to held-out episodes, the same on every rank; all take part."""
        place = {"rank": self.accelerator.process_index, "num_ranks": self.accelerator.num_processes}
        plan = sound_part(plan, **place, skips_bad_images=self.settings.skips_bad_images)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            policy = ModelPolicy(
                model,
                self.processing_class,
                settings,
                **place,
                on_progress=lambda num_rows: self.on_activity("evaluation"),
            )
            return evaluate(policy, plan, str(self.model.config._name_or_path)).document


def _padded_logps(rows: list[list[float]], ids_BT: Tensor) -> Tensor:
    """The rows as a tensor (B, T) float32 like the ids', NaN where a row has none."""
    length = ids_BT.shape[1]
    padded = [(row + [math.nan] * length)[:length] for row in rows]
    return torch.tensor(padded, dtype=torch.float32, device=ids_BT.device)
