"""FleetRLOOTrainer: REINFORCE leave-one-out on episodes, and the only code that leans on TRL's internals.

algorithm.py has the algorithm. Unlike TRL, a batch is encoded once per episode (TRL: twice per rollout), a group stays
whole on its device and in its micro-batch (TRL shuffles rollouts), and completions are judged with special tokens
visible (TRL strips them).
"""

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RLOOConfig
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import nanstd, pad, use_adapter

from dataset import (
    EpisodeBatch,
    RepeatableEpisodeDataset,
    VLMDataCollator,
    count_faults,
    prompts_of_rollouts,
    repeat_episodes,
    require_episodes,
)
from environment import judge
from fleet.errors import RunStopped
from fleet.evaluation.answering import AnswerSettings, ModelPolicy, sound_part
from fleet.evaluation.figures import EvaluationPlan, evaluate, headline_figures
from fleet.own_code.reward_function import Reward
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
from fleet.rl.algorithm import (
    clipped_loss,
    leave_one_out_advantages,
    needs_old_logps,
    sequence_logps,
    shaped_rewards,
    token_kl,
)
from fleet.rl.guards import RewardGuard, StepGuard, without_gradient_if_not_finite
from fleet.rl.resumable_trainer import ResumableTrainer
from fleet.rl.rollouts import RolloutRecord, length_metrics, make_records, rollout_metrics
from fleet.rl.vllm_sampling import VLLMSampler, sampling_kwargs
from fleet.schedule import num_episodes_of_run, require_whole_groups
from model_utils import decode_completion, end_token_ids, media_token_ids, up_to_end
from reward import DEFAULT_WEIGHTS, RewardWeights, make_trl_reward_function, reward_of

logger = logging.getLogger("fleet")

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


@dataclass
class Rollouts:
    """This device's completions of one generation and what is known of them so far; P whole groups of G."""

    batch: EpisodeBatch
    positions_3PL: Tensor  # int64, the model's positions of the prompts
    image_features: list[Tensor] | None  # one an image from the vision cache, or None for the encoder to run
    records: list[RolloutRecord]  # B, with verdict and reward
    completion_ids_BT: Tensor  # int64, right-padded
    completion_mask_BT: Tensor  # int64, 0 on padding and on masked truncated completions
    rewards_B: Tensor  # float32, from the task alone
    advantages_B: Tensor  # float32; filled step by step where a KL term waits for the step's own forward pass
    is_packed: bool  # whether a forward pass has each group as one row
    sampler_logps_BT: Tensor | None = None  # float32, what vLLM sampled with; NaN where it gave none, and on padding
    ref_logps_BT: Tensor | None = None  # float32, with beta > 0
    old_logps_BT: Tensor | None = None  # float32, of the policy that sampled, where needs_old_logps
    kl_and_tokens_2: Tensor | None = None  # float32 sums so far, with beta > 0


class FleetRLOOTrainer(ResumableTrainer):
    """TRL's RLOOTrainer, fed by RepeatableEpisodeDataset through VLMDataCollator.

    `latest_rollouts` holds the records of the last generation over all devices, the same on every one, and
    `latest_pictures` the pictures of this device's by the names that the records have. Besides TRL's metrics it logs
    rollouts.rollout_metrics, `rollouts_per_s`, `token_ratio` (tokens that would pass through TRL's training pass per
    token that passes through ours), `vision_cache/hit_rate` (of a generation's images), and TRL's `step_time` as
    `step_time_s`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: RLOOConfig,
        dataset: RepeatableEpisodeDataset,
        processing_class: Any,
        *,
        reward_weights: RewardWeights = DEFAULT_WEIGHTS,
        skips_bad_images: bool = False,
        allow_reasoning: bool = False,
        reward_function: Reward | None = None,
        max_skipped_steps: int = 5,
        peft_config: PeftConfig | None = None,
        shared_prefix: bool = True,
        vision_cache_bytes: int = 0,
        vllm_max_logprob_gap: float = 0.1,
        evaluation: tuple[EvaluationPlan, AnswerSettings] | None = None,
    ):
        """args: `make_rloo_config` says how episodes become TRL's batch sizes. processing_class: pads left.

        skips_bad_images: go on where an image has gone bad, on the episode that replaces its own, and log
        `images/episodes_replaced` (of a generation, over all devices); else the run stops, on all devices together.
        reward_function: the user's own in place of `reward_weights`, called with reward_function.KEYWORDS.
        max_skipped_steps: in a row, for gradients that are not finite or groups without two rollouts that count,
        after which training ends.
        shared_prefix: compute each prompt once per group, as long as that is less work; false takes TRL's own passes.
        vision_cache_bytes: host memory for the features of images, where the vision tower is frozen; 0 keeps none.
        vllm_max_logprob_gap: see VLLMSampler, where args.use_vllm.
        evaluation: the held-out episodes that `evaluate` scores, and how they are answered.
        Image and video tokens are never sampled. Raises ValueError if a group would be split over devices.
        """
        require_whole_groups(args.per_device_train_batch_size, args.num_generations)
        media_ids = media_token_ids(model.config)
        banned = sampling_kwargs(media_ids, end_token_ids(model)) if args.use_vllm else {"suppress_tokens": media_ids}
        args.generation_kwargs = banned | (args.generation_kwargs or {})
        super().__init__(
            model=model,
            # TRL asks it for its name alone, under which rewards are logged
            reward_funcs=reward_function or make_trl_reward_function(),
            args=args,
            train_dataset=dataset.as_hf_dataset(_num_episodes(args)),
            # Trainer wants one before it evaluates; `evaluate` has its own
            eval_dataset=None if evaluation is None else dataset.as_hf_dataset(1),
            processing_class=processing_class,
            peft_config=peft_config,
        )
        policy = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled:
            # loading under ZeRO-3 notes renamings that matched no weight, and saving would undo those as well
            # ("model.model.layers"); without the note, saving gives the hub's names
            policy._weight_conversions = None
        if args.beta == 0.0 and "ref" in getattr(self.model, "peft_config", {}):
            # TRL's copy of an adapter that training goes on from, which only a KL term would read
            self.model.delete_adapter("ref")
        # TRL's constructor insists on its own identity collator
        self.data_collator = VLMDataCollator(processing_class, args.num_generations)
        self.skips_bad_images = skips_bad_images
        self.verdict_weights = reward_weights
        self.reward_guard = None if reward_function is None else RewardGuard(reward_function)
        self.step_guard = StepGuard(self.accelerator, max_skipped_steps, self.is_at_generation_end)
        self.add_callback(self.step_guard)
        self.allow_reasoning = allow_reasoning
        self.shared_prefix = shared_prefix
        self.vision_cache: VisionCache | None = None
        if vision_cache_bytes and not takes_image_features():
            logger.info("this transformers takes no image features, so every pass encodes its images; 5.18 takes them")
        elif vision_cache_bytes and shared_prefix:
            self.vision_cache = VisionCache(policy, vision_cache_bytes)
        self.vllm: VLLMSampler | None = None
        if args.use_vllm:
            self.vllm = VLLMSampler(self.vllm_generation, processing_class, vllm_max_logprob_gap)
        self.latest_rollouts: tuple[RolloutRecord, ...] = ()
        self.latest_pictures: dict[str, Image.Image] = {}
        self.evaluation = evaluation
        self.latest_evaluation: dict[str, Any] | None = None
        self._rollouts: Rollouts | None = None
        self._attention = base_qwen(policy).config.get_text_config()._attn_implementation
        self._has_told_why_not_packed = False
        self._num_rollouts_since_log = 0
        self._last_log_time_s = time.perf_counter()

    def _prepare_inputs(self, generation_batch: EpisodeBatch) -> dict[str, Any]:
        """The groups of this step, as `rollouts` and a slice of them; generates first when a new generation is due."""
        steps_per_generation = self.args.steps_per_generation
        if self._rollouts is None or self._step % (steps_per_generation * self.num_iterations) == 0:
            self._rollouts = self._roll_out(generation_batch)
        first = self._step % steps_per_generation * self._groups_per_step
        return {"rollouts": self._rollouts, "groups": slice(first, first + self._groups_per_step)}

    @property
    def _groups_per_step(self) -> int:
        return self.args.per_device_train_batch_size // self.num_generations

    @torch.no_grad()
    def _roll_out(self, batch: EpisodeBatch) -> Rollouts:
        """Samples G completions of each episode and rewards them. Every rank takes part."""
        self.on_activity("generation")
        found = gather_object([(batch["broken"], batch["faults"])])
        require_episodes([broken for broken, _ in found])
        num_replaced = count_faults([faults for _, faults in found], skips_bad_images=self.skips_bad_images)
        if self.skips_bad_images:
            self._metrics["train"]["images/episodes_replaced"].append(float(num_replaced))
        features = self._image_features(batch)
        sampler_logps = None
        if self.vllm is None:
            completion_ids = self._sample_completion_ids(batch, features)
        else:
            completion_ids, sampler_logps = self._sample_with_vllm(batch)
        self.on_activity("rewards")
        records = self._judge_and_reward(batch, completion_ids)
        ids_BT = self._pad_completions(completion_ids)
        mask_BT = self._pad_completions([[1] * len(ids) for ids in completion_ids], padding_value=0)
        if self.mask_truncated_completions:
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            is_ended_B = torch.tensor([ids[-1] in ends for ids in completion_ids], device=ids_BT.device)
            mask_BT = mask_BT * is_ended_B.unsqueeze(1)
        rollouts = Rollouts(
            batch=batch,
            positions_3PL=prompt_positions(self.accelerator.unwrap_model(self.model), batch),
            image_features=features,
            records=records,
            completion_ids_BT=ids_BT,
            completion_mask_BT=mask_BT,
            rewards_B=torch.tensor([record.reward for record in records], device=ids_BT.device),
            advantages_B=torch.zeros(len(records), device=ids_BT.device),
            is_packed=self._chooses_packing(batch, mask_BT),
            sampler_logps_BT=None if sampler_logps is None else self._pad_logps(sampler_logps, ids_BT),
        )
        self._log_completions(batch, completion_ids)
        self.on_activity("scoring")
        if self.beta != 0.0:
            rollouts.ref_logps_BT = self._score_reference(rollouts)
        if needs_old_logps(self.args):
            rollouts.old_logps_BT = self._score(self.model, rollouts)
            self._compare_with_vllm(rollouts, slice(0, len(records)), rollouts.old_logps_BT)
        if self.beta == 0.0 or rollouts.old_logps_BT is not None:
            self._take_advantages(rollouts, slice(0, len(records)), rollouts.old_logps_BT)
        return rollouts

    def _image_features(self, batch: EpisodeBatch) -> list[Tensor] | None:
        """The features of the batch's images from the vision cache, in host memory; None without a cache."""
        cache, digests = self.vision_cache, batch["image_digests"]
        if cache is None:
            return None
        policy = self.accelerator.unwrap_model(self.model)
        # under ZeRO-3 the encoder's weights are gathered by all ranks, so all call it equally often
        unknown_of_ranks = gather_object([len(cache.unknown_places(digests))])
        with (
            self.accelerator.autocast(),
            disable_gradient_checkpointing(policy, self.args.gradient_checkpointing_kwargs),
        ):
            features = cache.features_of(
                digests, lambda place: encode_image(policy, batch, place), num_calls=max(unknown_of_ranks)
            )
        num_images = sum(gather_object([len(digests)]))
        self._metrics["train"]["vision_cache/hit_rate"].append(1 - sum(unknown_of_ranks) / num_images)
        return features

    def _sample_completion_ids(self, batch: EpisodeBatch, features: list[Tensor] | None) -> list[list[int]]:
        """B completions as token ids, each up to and with its first end token, never empty, free of media tokens."""
        if self.shared_prefix:
            completion_ids = self._generate_behind_one_prefill(batch, features)
        else:
            rows = repeat_episodes(batch, 0, len(batch["episodes"]))
            fields = {key: rows[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
            completion_ids = self._generate_single_turn(*prompts_of_rollouts(batch), fields)
        return self._usable(completion_ids)

    def _sample_with_vllm(self, batch: EpisodeBatch) -> tuple[list[list[int]], list[list[float]]]:
        """The same from vLLM, with the log-probability that each token was sampled with."""
        assert self.vllm is not None
        completion_ids, logps = self.vllm.sample(batch, self.state.global_step)
        return self._usable(completion_ids), logps

    def _usable(self, completion_ids: list[list[int]]) -> list[list[int]]:
        media_ids = set(media_token_ids(self.model.config))
        return [_without_media(ids, media_ids) or [self.eos_token_ids[0]] for ids in completion_ids]

    def _generate_behind_one_prefill(self, batch: EpisodeBatch, features: list[Tensor] | None) -> list[list[int]]:
        checkpointing = self.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=checkpointing,
        ) as policy:
            rows = generate_groups(policy, batch, features, self.generation_config).tolist()
        return [up_to_end(ids, self.eos_token_ids) for ids in rows]

    def _pad_completions(self, rows: list[list[int]], padding_value: int | None = None) -> Tensor:
        value = self._tokenizer.pad_token_id if padding_value is None else padding_value
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right").to(self.accelerator.device)

    def _pad_logps(self, rows: list[list[float]], ids_BT: Tensor) -> Tensor:
        """The rows as a tensor (B, T) float32 like the ids', NaN where a row has none."""
        length = ids_BT.shape[1]
        padded = [(row + [math.nan] * length)[:length] for row in rows]
        return torch.tensor(padded, dtype=torch.float32, device=ids_BT.device)

    def _chooses_packing(self, batch: EpisodeBatch, mask_BT: Tensor) -> bool:
        """Whether this generation's forward passes have each group as one row; decided on the work of all devices."""
        if not self.shared_prefix:
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
        token_ratio = work.unpacked_tokens / work.packed_tokens if reason is None else 1.0
        self._metrics["train"]["token_ratio"].append(token_ratio)
        return reason is None

    def _score_reference(self, rollouts: Rollouts) -> Tensor:
        """The completions' log-probabilities (B, T) under the reference: another model, or this one's base."""
        if self.ref_model is not None:
            return self._score(self.ref_model, rollouts)
        # TRL keeps a copy of an adapter that training began with as "ref"; a new adapter begins as none at all
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._score(self.model, rollouts)

    @torch.no_grad()
    def _score(self, model: nn.Module, rollouts: Rollouts) -> Tensor:
        """The completions' log-probabilities (B, T) under a model, as many groups at a time as a step has."""
        size, num_groups = self._groups_per_step, len(rollouts.batch["episodes"])
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return torch.cat(
                [
                    self._completion_logps(model, rollouts, slice(first, first + size))[0]
                    for first in range(0, num_groups, size)
                ]
            )

    def _completion_logps(self, model: nn.Module, rollouts: Rollouts, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies (b, T) of these groups' completion tokens, from one forward pass."""
        batch, size = rollouts.batch, rollouts.batch["group_size"]
        rows = slice(groups.start * size, groups.stop * size)
        ids_BT, mask_BT = rollouts.completion_ids_BT[rows], rollouts.completion_mask_BT[rows]
        if not rollouts.is_packed:
            return self._score_as_trl(model, repeat_episodes(batch, groups.start, groups.stop), ids_BT, mask_BT)
        packed = pack_groups(
            batch["input_ids"][groups],
            batch["attention_mask"][groups],
            rollouts.positions_3PL[:, groups],
            ids_BT.view(-1, size, ids_BT.shape[1]),
            mask_BT.sum(dim=1).view(-1, size),
            self._tokenizer.pad_token_id,
        )
        images = image_inputs(batch, groups, rollouts.image_features)
        with self.accelerator.autocast():
            logps_PS, entropies_PS = score_packed(model, packed, images, self._attention)
        logps_BT = unpack(logps_PS, packed).flatten(0, 1)
        return logps_BT, None if entropies_PS is None else unpack(entropies_PS, packed).flatten(0, 1)

    def _score_as_trl(
        self, model: nn.Module, rows: dict[str, Any], ids_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        logps_BT, entropies_BT, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([rows["prompt_ids"], ids_BT], dim=1),
            torch.cat([rows["prompt_mask"], mask_BT], dim=1),
            ids_BT.shape[1],
            compute_entropy=torch.is_grad_enabled(),
            pixel_values=rows["pixel_values"],
            image_grid_thw=rows["image_grid_thw"],
            num_images=rows["num_images"],
            # completions hold no image tokens
            mm_token_type_ids=torch.cat([rows["mm_token_type_ids"], torch.zeros_like(ids_BT)], dim=1),
        )
        return logps_BT, entropies_BT

    def _judge_and_reward(self, batch: EpisodeBatch, completion_ids: list[list[int]]) -> list[RolloutRecord]:
        """This device's B completions, each judged once and rewarded; logs the rewards of all devices.

        Raises RunStopped on all processes if the user's reward function is broken on any.
        """
        episodes = [episode for episode in batch["episodes"] for _ in range(batch["group_size"])]
        completions = [decode_completion(self.processing_class, ids, self.eos_token_ids) for ids in completion_ids]
        verdicts = [
            judge(completion, episode.correct_index, episode.num_candidates, allow_reasoning=self.allow_reasoning)
            for completion, episode in zip(completions, episodes, strict=True)
        ]
        if self.reward_guard is None:
            rewards, dropped = [reward_of(verdict, self.verdict_weights) for verdict in verdicts], None
        else:
            rewards = self.reward_guard(
                completions,
                self.state.global_step + 1,
                prompts=[prompt for prompt in batch["prompts"] for _ in range(batch["group_size"])],
                completion_ids=[list(ids) for ids in completion_ids],
                correct_index=[episode.correct_index for episode in episodes],
                num_candidates=[episode.num_candidates for episode in episodes],
                episode=episodes,
                trainer_state=self.state,
            )
            dropped = self.reward_guard.latest_dropped
        self.step_guard.begin_generation(dropped)
        rewards_B = torch.tensor(rewards, device=self.accelerator.device) * self.reward_weights[0].item()
        self._log_rewards(self.accelerator.gather(rewards_B))
        names = picture_names(batch["images"], batch["image_digests"])
        return make_records(batch["episodes"], names, completions, verdicts, rewards_B.tolist())

    def _log_rewards(self, rewards_B: Tensor) -> None:
        """Logs TRL's metrics of the rewards of all devices, NaN where one was dropped."""
        mean, deviation = rewards_B.nanmean().item(), nanstd(rewards_B).item()
        (name,) = self.reward_func_names
        for key, value in (("reward", mean), ("reward_std", deviation),
                           (f"rewards/{name}/mean", mean), (f"rewards/{name}/std", deviation)):  # fmt: skip
            self._metrics["train"][key].append(value)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of these groups. On-policy, the forward pass that is trained on is the policy's only one."""
        self.on_activity("the training pass")
        rollouts, groups = inputs["rollouts"], inputs["groups"]
        size = rollouts.batch["group_size"]
        rows = slice(groups.start * size, groups.stop * size)
        mask_BT = rollouts.completion_mask_BT[rows]
        logps_BT, entropies_BT = self._completion_logps(model, rollouts, groups)
        if rollouts.old_logps_BT is None:
            old_logps_BT = logps_BT.detach()
            self._compare_with_vllm(rollouts, rows, old_logps_BT)
            if self.beta != 0.0:
                self._take_advantages(rollouts, rows, old_logps_BT)
        else:
            old_logps_BT = rollouts.old_logps_BT[rows]
        loss, is_clipped_below_B, is_clipped_above_B = clipped_loss(
            sequence_logps(logps_BT, mask_BT),
            sequence_logps(old_logps_BT, mask_BT),
            rollouts.advantages_B[rows],
            self.epsilon_low,
            self.epsilon_high,
        )
        assert entropies_BT is not None, "the training pass gives entropies"
        self._log_entropy(entropies_BT.detach(), mask_BT)
        self._log_clipping(is_clipped_below_B, is_clipped_above_B)
        return without_gradient_if_not_finite(loss)

    def _log_entropy(self, entropies_BT: Tensor, mask_BT: Tensor) -> None:
        """Logs TRL's metric of the tokens' mean entropy over all devices."""
        own_2 = torch.stack([(entropies_BT * mask_BT).sum(), mask_BT.sum().float()])
        total, num_tokens = self.accelerator.reduce(own_2, reduction="sum")
        self._metrics["train"]["entropy"].append((total / num_tokens.clamp(min=1.0)).item())

    def _log_clipping(self, is_clipped_below_B: Tensor, is_clipped_above_B: Tensor) -> None:
        """Logs TRL's metrics of the clipped rollouts' shares over all devices."""
        own_B2 = torch.stack([is_clipped_below_B, is_clipped_above_B], dim=1).float()
        below_B, above_B = self.accelerator.gather(own_B2).unbind(dim=1)
        metrics = self._metrics["train"]
        metrics["clip_ratio/low_mean"].append(below_B.mean().item())
        metrics["clip_ratio/low_min"].append(below_B.min().item())
        metrics["clip_ratio/high_mean"].append(above_B.mean().item())
        metrics["clip_ratio/high_max"].append(above_B.max().item())
        # a rollout's advantage has one sign, so it is clipped on one side at most
        metrics["clip_ratio/region_mean"].append((below_B + above_B).mean().item())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, for the log and for the guard that decides whether the step is taken."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.step_guard.gradient_norm = float(norm)
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains. Raises RunStopped, once a checkpoint is saved, after too many steps in a row that taught nothing."""
        self._last_log_time_s = time.perf_counter()
        output = super().train(*args, **kwargs)
        if self.step_guard.stop_reason is not None:
            raise RunStopped(self.step_guard.stop_reason, can_resume=self.step_guard.has_taught)
        return output

    @torch.no_grad()
    def _take_advantages(self, rollouts: Rollouts, rows: slice, logps_BT: Tensor | None) -> None:
        """Fills in the advantages of these rows, and records the rollouts once the last row has its own.

        With beta > 0 a reward loses beta times its sequence's KL, the log-ratio to the reference (first order). Every
        rank takes part.
        """
        kl_BT = None
        if logps_BT is not None and rollouts.ref_logps_BT is not None:
            mask_BT = rollouts.completion_mask_BT[rows]
            kl_BT = token_kl(logps_BT, rollouts.ref_logps_BT[rows], mask_BT)
            sums_2 = torch.stack([kl_BT.sum(), mask_BT.sum().float()])
            rollouts.kl_and_tokens_2 = sums_2 + (0 if rollouts.kl_and_tokens_2 is None else rollouts.kl_and_tokens_2)
        shaped_B = shaped_rewards(rollouts.rewards_B[rows], kl_BT, self.beta, self.reward_clip_range)
        shaped_all = self.accelerator.gather(shaped_B)
        self.step_guard.note_scores(shaped_all.view(-1, self.num_generations))
        self._metrics["train"]["rewards/dropped"].append(shaped_all.isnan().float().mean().item())
        is_tied_P = nanstd(shaped_all.view(-1, self.num_generations), dim=1) < 1e-8
        self._metrics["train"]["frac_reward_zero_std"].append(is_tied_P.float().mean().item())
        advantages_PG = leave_one_out_advantages(
            shaped_all.view(-1, self.num_generations), normalize=self.normalize_advantages
        )
        rollouts.advantages_B[rows] = advantages_PG.view(-1)[self._own_rows(len(shaped_B))]
        if rows.stop == len(rollouts.records):
            self._record(rollouts)

    def _compare_with_vllm(self, rollouts: Rollouts, rows: slice, logps_BT: Tensor) -> None:
        """Compares these rows' log-probabilities with those that vLLM sampled with. Every rank takes part."""
        if self.vllm is None or rollouts.sampler_logps_BT is None:
            return
        sampler_BT, mask_BT = rollouts.sampler_logps_BT[rows], rollouts.completion_mask_BT[rows]
        is_last = rows.stop == len(rollouts.records)
        for name, value in self.vllm.compare(logps_BT, sampler_BT, mask_BT, is_last=is_last).items():
            self._metrics["train"][name].append(value)

    def _own_rows(self, num_rows: int) -> slice:
        """Where this device's rows are among those of all devices, each of which has as many."""
        first = self.accelerator.process_index * num_rows
        return slice(first, first + num_rows)

    def _log_completions(self, batch: EpisodeBatch, completion_ids: list[list[int]]) -> None:
        """TRL's metrics of completion lengths, over all devices, and of tokens seen since the start."""
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        prompt_tokens = int(batch["attention_mask"].sum()) * batch["group_size"]
        own = prompt_tokens, [len(ids) for ids in completion_ids], [ids[-1] in ends for ids in completion_ids]
        of_ranks = gather_object([own])
        lengths = [length for _, of_rank, _ in of_ranks for length in of_rank]
        self.state.num_input_tokens_seen += sum(of_rank[0] for of_rank in of_ranks) + sum(lengths)
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        is_ended = [has_end for _, _, of_rank in of_ranks for has_end in of_rank]
        for name, value in length_metrics(lengths, is_ended).items():
            self._metrics["train"][name].append(value)

    def _record(self, rollouts: Rollouts) -> None:
        """Gathers every rollout's record to every rank, and logs what they amount to."""
        records = [
            replace(record, advantage=advantage)
            for record, advantage in zip(rollouts.records, rollouts.advantages_B.tolist(), strict=True)
        ]
        self.latest_pictures = {
            name: picture
            for record, pictures in zip(records[:: self.num_generations], rollouts.batch["images"], strict=True)
            for name, picture in zip(record.episode.image_names, pictures, strict=True)
        }
        self.latest_rollouts = tuple(gather_object(records))
        self._num_rollouts_since_log += len(self.latest_rollouts)
        for name, value in rollout_metrics(self.latest_rollouts, self.num_generations).items():
            self._metrics["train"][name].append(value)
        if rollouts.kl_and_tokens_2 is not None:
            kl, num_tokens = self.accelerator.reduce(rollouts.kl_and_tokens_2, reduction="sum").tolist()
            self._metrics["train"]["kl"].append(kl / max(num_tokens, 1))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the held-out episodes and logs the figures, on all ranks; training's randomness is left as it was."""
        assert self.evaluation is not None, "no evaluation was given to the trainer"
        plan, settings = self.evaluation
        ranks = {"rank": self.accelerator.process_index, "num_ranks": self.accelerator.num_processes}
        plan = sound_part(plan, **ranks, skips_bad_images=self.skips_bad_images)
        self.model.eval()
        start_s = time.perf_counter()
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as policy_model:
            policy = ModelPolicy(
                policy_model,
                self.processing_class,
                settings,
                **ranks,
                on_progress=lambda num_rows: self.on_activity("evaluation"),
            )
            document = evaluate(policy, plan, str(self.model.config._name_or_path)).document
        self.latest_evaluation = document | {"step": self.state.global_step}
        seconds = time.perf_counter() - start_s
        # rollouts_per_s is of training
        self._last_log_time_s += seconds
        figures = headline_figures(document) | {"seconds": seconds}
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.model.train()
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with Fleet's rates in it."""
        if not self.model.training:
            super().log(logs, start_time)
            return
        metrics, now = self._metrics["train"], time.perf_counter()
        if "step_time" in metrics:
            metrics["step_time_s"] = metrics.pop("step_time")
            metrics["skipped_steps"] = [self.step_guard.num_skipped]
            metrics["rollouts_per_s"] = [self._num_rollouts_since_log / (now - self._last_log_time_s)]
        self._num_rollouts_since_log, self._last_log_time_s = 0, now
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: TRL's card presents a published text model, and a run folder has config.json."""


def picture_names(images: list[list[Image.Image]], digests: list[bytes]) -> list[list[str]]:
    """A file name for each episode's pictures, the same for pictures of equal pixels. digests: of all, in order."""
    remaining = iter(digests)
    return [[f"{next(remaining).hex()[:16]}.webp" for _ in pictures] for pictures in images]


def _num_episodes(args: RLOOConfig) -> int:
    """The episodes that `args.max_steps` optimizer steps draw over all devices: one epoch, so no order repeats."""
    return num_episodes_of_run(
        args.max_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        episodes_per_micro_step=args.generation_batch_size // args.steps_per_generation // args.num_generations,
    )


def _without_media(completion_ids: list[int], media_ids: set[int]) -> list[int]:
    """The completion up to its first image or video token, of which a sampler is told to draw none."""
    stop = next((place for place, token in enumerate(completion_ids) if token in media_ids), len(completion_ids))
    return completion_ids[:stop]
