"""FleetRLOOTrainer: REINFORCE leave-one-out on episodes, and the only code that leans on TRL's internals.

The algorithm is RLOO of "Back to Basics" (arXiv 2402.14740): the advantage of a rollout is its reward minus the mean
reward of its siblings, and a completion is one action, so its log-probability is the sum over its tokens. As TRL
does, and unlike the paper, the loss is PPO's clipped ratio; with one step per generation the ratio is 1 and its
gradient is exactly REINFORCE's. With beta > 0 the sequence's KL to the reference is taken off its reward, as in the
paper. Unlike TRL, a batch is encoded once per episode (TRL: twice per rollout), a group stays whole on its device and
in its micro-batch (TRL shuffles rollouts), and completions are judged with special tokens visible (TRL strips them).
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import nanstd, pad, use_adapter

from dataset import EpisodeBatch, RepeatableEpisodeDataset, VLMDataCollator, repeat_episodes
from environment import judge
from model_utils import decode_completion, media_token_ids
from reward import DEFAULT_WEIGHTS, RewardWeights, make_trl_reward_function
from rollouts import RolloutRecord, rollout_metrics

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """Advantage of each rollout over the mean of its siblings.

    rewards_PG: (P, G) float, G >= 2; NaN marks a rollout that could not be scored: it is nobody's sibling and its
    advantage is 0, as is that of a rollout without a scored sibling. Returns (P, G); each row sums to 0.
    Raises ValueError if G < 2 or a reward is infinite.
    Source: "Back to Basics", arXiv 2402.14740, the RLOO estimator.

    >>> leave_one_out_advantages(torch.tensor([[1., 0., 0., 0.]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"{rewards_PG.shape[1]} rollout per episode, but leave-one-out needs at least 2; pass --num_rollouts 4"
        )
    if torch.isinf(rewards_PG).any():
        raise ValueError("a reward is infinite, and one such reward destroys the policy; return finite numbers")
    num_siblings_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True) - 1
    siblings_sum_PG = rewards_PG.nansum(dim=1, keepdim=True) - rewards_PG
    return (rewards_PG - siblings_sum_PG / num_siblings_P1).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class Rollouts:
    """This device's completions of one generation, ready to be trained on; P whole groups of G."""

    batch: EpisodeBatch
    completion_ids_BT: Tensor  # int64, right-padded
    completion_mask_BT: Tensor  # int64, 0 on padding and on masked truncated completions
    old_logps_B: Tensor  # float32, summed over tokens
    advantages_B: Tensor  # float32


class FleetRLOOTrainer(RLOOTrainer):
    """TRL's RLOOTrainer, fed by RepeatableEpisodeDataset through VLMDataCollator.

    `latest_rollouts` holds the records of the last generation over all devices, the same on every one. Besides TRL's
    metrics it logs rollouts.rollout_metrics, `rollouts_per_s`, and TRL's `step_time` as `step_time_s`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: RLOOConfig,
        dataset: RepeatableEpisodeDataset,
        processing_class: Any,
        *,
        reward_weights: RewardWeights = DEFAULT_WEIGHTS,
        allow_reasoning: bool = False,
        peft_config: PeftConfig | None = None,
    ):
        """args: `make_rloo_config` says how episodes become TRL's batch sizes. processing_class: pads left.

        Image and video tokens are never sampled. Raises ValueError if a group would be split over devices.
        """
        refuse_split_groups(args)
        if not args.use_vllm:
            suppressed = {"suppress_tokens": media_token_ids(model.config)}
            args.generation_kwargs = suppressed | (args.generation_kwargs or {})
        super().__init__(
            model=model,
            reward_funcs=make_trl_reward_function(reward_weights, allow_reasoning=allow_reasoning),
            args=args,
            train_dataset=dataset.as_hf_dataset(num_episodes_of_run(args)),
            processing_class=processing_class,
            peft_config=peft_config,
        )
        if self.is_deepspeed_enabled:
            # loading under ZeRO-3 notes renamings that matched no weight, and saving would undo those as well
            # ("model.model.layers"); without the note, saving gives the hub's names
            self.accelerator.unwrap_model(self.model)._weight_conversions = None
        if args.beta == 0.0 and "ref" in getattr(self.model, "peft_config", {}):
            # TRL's copy of an adapter that training goes on from, which only a KL term would read
            self.model.delete_adapter("ref")
        # TRL's constructor insists on its own identity collator
        self.data_collator = VLMDataCollator(processing_class, args.num_generations)
        self.allow_reasoning = allow_reasoning
        self.latest_rollouts: tuple[RolloutRecord, ...] = ()
        self._rollouts: Rollouts | None = None
        self._num_rollouts_since_log = 0
        self._last_log_time_s = time.perf_counter()

    def _prepare_inputs(self, generation_batch: EpisodeBatch) -> dict[str, Any]:
        """The micro-batch of this step, in the form of TRL's loss; generates first when a new generation is due."""
        steps_per_generation = self.args.steps_per_generation
        if self._rollouts is None or self._step % (steps_per_generation * self.num_iterations) == 0:
            self._rollouts = self._roll_out(generation_batch)
        groups_per_step = len(self._rollouts.batch["episodes"]) // steps_per_generation
        first = self._step % steps_per_generation * groups_per_step
        return _micro_batch(self._rollouts, first, first + groups_per_step)

    @torch.no_grad()
    def _roll_out(self, batch: EpisodeBatch) -> Rollouts:
        """Samples G completions of each episode and turns their rewards into advantages. Every rank takes part."""
        completions = self._sample_completions(batch)
        ids_BT = self._pad_completions(completions)
        mask_BT = self._pad_completions([[1] * len(ids) for ids in completions], padding_value=0)
        if self.mask_truncated_completions:
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            is_ended_B = torch.tensor([ids[-1] in ends for ids in completions], device=ids_BT.device)
            mask_BT = mask_BT * is_ended_B.unsqueeze(1)
        logps_BT, ref_logps_BT = self._score(batch, ids_BT, mask_BT)
        texts = [decode_completion(self.processing_class, ids, self.eos_token_ids) for ids in completions]
        rewards_all = self._task_rewards(batch, texts, completions)
        shaped_all = self._subtract_kl(rewards_all, logps_BT, ref_logps_BT, mask_BT)
        is_tied_P = nanstd(shaped_all.view(-1, self.num_generations), dim=1) < 1e-8
        self._metrics["train"]["frac_reward_zero_std"].append(is_tied_P.float().mean().item())
        advantages_all = leave_one_out_advantages(shaped_all.view(-1, self.num_generations)).view(-1)
        if self.normalize_advantages:
            advantages_all = (advantages_all - advantages_all.mean()) / (advantages_all.std() + 1e-4)
        own = slice(self.accelerator.process_index * len(texts), (self.accelerator.process_index + 1) * len(texts))
        self._log_completions(batch, completions)
        self._record(batch, texts, rewards_all, advantages_all, own)
        return Rollouts(batch, ids_BT, mask_BT, (logps_BT * mask_BT).sum(1), advantages_all[own])

    def _sample_completions(self, batch: EpisodeBatch) -> list[list[int]]:
        """B completions as token ids, each up to and with its first end token, never empty, free of media tokens."""
        rows = repeat_episodes(batch, 0, len(batch["episodes"]))
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(rows["prompt_ids"], rows["prompt_mask"], strict=True)]
        images = [pictures for pictures in batch["images"] for _ in range(batch["group_size"])]
        fields = {key: rows[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
        media_ids = set(media_token_ids(self.model.config))
        return [
            _without_media(ids, media_ids) or [self.eos_token_ids[0]]
            for ids in self._generate_single_turn(prompts, images, fields)
        ]

    def _pad_completions(self, rows: list[list[int]], padding_value: int | None = None) -> Tensor:
        value = self._tokenizer.pad_token_id if padding_value is None else padding_value
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right").to(self.accelerator.device)

    def _score(self, batch: EpisodeBatch, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B, T) of the completions under the policy and, with beta > 0, under the reference."""
        inputs = _loss_inputs(repeat_episodes(batch, 0, len(batch["episodes"])), ids_BT, mask_BT)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps_BT = self._completion_logps(self.model, inputs)
            if self.beta == 0.0:
                return logps_BT, None
            if self.ref_model is not None:
                return logps_BT, self._completion_logps(self.ref_model, inputs)
            # TRL keeps a copy of an adapter that training began with as "ref"; a new adapter begins as none at all
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                return logps_BT, self._completion_logps(self.model, inputs)

    def _completion_logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        logps_BT, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            **{name: inputs[name] for name in names},
        )
        return logps_BT

    def _task_rewards(self, batch: EpisodeBatch, texts: list[str], completions: list[list[int]]) -> Tensor:
        """Rewards of all devices' rollouts, in order of devices; NaN where every reward function returned None."""
        rows = [
            {"correct_index": episode.correct_index, "num_candidates": episode.num_candidates, "episode": episode}
            for episode in batch["episodes"]
            for _ in range(batch["group_size"])
        ]
        prompts = [prompt for prompt in batch["prompts"] for _ in range(batch["group_size"])]
        per_function = self._calculate_rewards(rows, prompts, texts, completions)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        rewards[per_function.isnan().all(dim=1)] = torch.nan
        named = {f"rewards/{name}/": per_function[:, place] for place, name in enumerate(self.reward_func_names)}
        for prefix, values in named.items():
            self._metrics["train"][f"{prefix}mean"].append(values.nanmean().item())
            self._metrics["train"][f"{prefix}std"].append(nanstd(values).item())
        self._metrics["train"]["reward"].append(rewards.nanmean().item())
        self._metrics["train"]["reward_std"].append(nanstd(rewards).item())
        return rewards

    def _subtract_kl(self, rewards: Tensor, logps_BT: Tensor, ref_logps_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
        """Clipped task rewards minus beta times each sequence's log-ratio to the reference (first-order KL)."""
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        if ref_logps_BT is None:
            return rewards
        kl_BT = (logps_BT - ref_logps_BT) * mask_BT
        sums = self.accelerator.reduce(torch.stack([kl_BT.sum(), mask_BT.sum().float()]), reduction="sum")
        self._metrics["train"]["kl"].append((sums[0] / sums[1].clamp(min=1)).item())
        return rewards - self.beta * self.accelerator.gather(kl_BT.sum(dim=1))

    def _log_completions(self, batch: EpisodeBatch, completions: list[list[int]]) -> None:
        """TRL's metrics of completion lengths in tokens, over all devices, and of tokens seen since the start."""
        device, metrics = self.accelerator.device, self._metrics["train"]
        prompt_tokens = batch["attention_mask"].sum() * batch["group_size"]
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(prompt_tokens, reduction="sum").item())
        lengths = self.accelerator.gather(torch.tensor([len(ids) for ids in completions], device=device))
        self.state.num_input_tokens_seen += int(lengths.sum().item())
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        is_ended = self.accelerator.gather(torch.tensor([ids[-1] in ends for ids in completions], device=device))
        ended_lengths = lengths[is_ended] if is_ended.any() else lengths.new_zeros(1)
        metrics["completions/clipped_ratio"].append(1 - is_ended.float().mean().item())
        for name, values in (("length", lengths.float()), ("terminated_length", ended_lengths.float())):
            metrics[f"completions/mean_{name}"].append(values.mean().item())
            metrics[f"completions/min_{name}"].append(values.min().item())
            metrics[f"completions/max_{name}"].append(values.max().item())

    def _record(self, batch: EpisodeBatch, texts: list[str], rewards: Tensor, advantages: Tensor, own: slice) -> None:
        """Gathers every rollout's record to every rank, and logs what they amount to."""
        episodes = [episode for episode in batch["episodes"] for _ in range(batch["group_size"])]
        values = zip(episodes, texts, rewards[own].tolist(), advantages[own].tolist(), strict=True)
        records = [
            RolloutRecord(
                target=episode.target,
                correct_index=episode.correct_index,
                num_candidates=episode.num_candidates,
                completion=text,
                judgement=judge(
                    text, episode.correct_index, episode.num_candidates, allow_reasoning=self.allow_reasoning
                ),
                reward=reward,
                advantage=advantage,
            )
            for episode, text, reward, advantage in values
        ]
        self.latest_rollouts = tuple(gather_object(records))
        self._num_rollouts_since_log += len(self.latest_rollouts)
        for name, value in rollout_metrics(self.latest_rollouts, self.num_generations).items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with Fleet's rates in it."""
        metrics, now = self._metrics["train"], time.perf_counter()
        if "step_time" in metrics:
            metrics["step_time_s"] = metrics.pop("step_time")
            metrics["rollouts_per_s"] = [self._num_rollouts_since_log / (now - self._last_log_time_s)]
        self._num_rollouts_since_log, self._last_log_time_s = 0, now
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: TRL's card presents a published text model, and a run folder has config.json."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads a checkpoint's weights, all of them or none.

        Trainer's own way leaves a full fine-tune at its base weights: the names in the file differ from the model's
        and are passed over. `from_pretrained` maps them. Raises RuntimeError for missing or unexpected weights.
        """
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        if not isinstance(policy, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(policy).from_pretrained(resume_from_checkpoint, dtype=policy.dtype)
        policy.load_state_dict(saved.state_dict(), strict=True)


def refuse_split_groups(args: RLOOConfig) -> None:
    """Raises ValueError unless every device's micro-batch holds whole groups."""
    if args.per_device_train_batch_size % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} is not a multiple of "
            f"num_generations={args.num_generations}, but a group stays whole on its device; make it one"
        )


def num_episodes_of_run(args: RLOOConfig) -> int:
    """How many episodes `args.max_steps` optimizer steps draw over all devices: one epoch, so no order repeats."""
    micro_steps = args.max_steps * args.gradient_accumulation_steps
    num_generations_of_run = -(-micro_steps // (args.steps_per_generation * args.num_iterations))
    return num_generations_of_run * args.generation_batch_size // args.num_generations


def _loss_inputs(rows: dict[str, Any], completion_ids_BT: Tensor, completion_mask_BT: Tensor) -> dict[str, Any]:
    """TRL's inputs of a forward pass over prompts and their completions, which hold no image tokens."""
    text_ids_BT = torch.zeros_like(completion_ids_BT)
    return {
        **rows,
        "mm_token_type_ids": torch.cat([rows["mm_token_type_ids"], text_ids_BT], dim=1),
        "completion_ids": completion_ids_BT,
        "completion_mask": completion_mask_BT,
    }


def _micro_batch(rollouts: Rollouts, first: int, last: int) -> dict[str, Any]:
    """The inputs of TRL's loss for the groups first to last - 1."""
    rows = slice(first * rollouts.batch["group_size"], last * rollouts.batch["group_size"])
    repeated = repeat_episodes(rollouts.batch, first, last)
    return {
        **_loss_inputs(repeated, rollouts.completion_ids_BT[rows], rollouts.completion_mask_BT[rows]),
        "old_logps": rollouts.old_logps_B[rows],
        "advantages": rollouts.advantages_B[rows],
    }


def _without_media(completion_ids: list[int], media_ids: set[int]) -> list[int]:
    """The completion up to its first image or video token; only vLLM, which cannot suppress them, samples one."""
    stop = next((place for place, token in enumerate(completion_ids) if token in media_ids), len(completion_ids))
    return completion_ids[:stop]
