"""FleetRLOOTrainer: the loop of REINFORCE leave-one-out on episodes, from a batch to the loss.

algorithm.py has the algorithm, judging.py the rewards, policy_passes.py the passes through the model. Unlike TRL, a
batch is encoded once per episode (TRL: twice per rollout), and a group stays whole on its device and in its micro-batch
(TRL shuffles rollouts).
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RLOOConfig
from trl.trainer.utils import nanstd

from dataset import EpisodeBatch, RepeatableEpisodeDataset, VLMDataCollator
from fleet.errors import RunStopped
from fleet.evaluation.answering import AnswerSettings
from fleet.evaluation.figures import Evaluation, EvaluationPlan, headline_figures
from fleet.own_code.reward_process import RewardProcess
from fleet.rl.algorithm import (
    clipped_loss,
    leave_one_out_advantages,
    needs_old_logps,
    sequence_logps,
    shaped_rewards,
    token_kl,
)
from fleet.rl.dynamic_sampling import DynamicSampling
from fleet.rl.guards import without_gradient_if_not_finite
from fleet.rl.judging import Rollouts
from fleet.rl.look_watch import LookWatch
from fleet.rl.rollouts import RolloutRecord, rollout_metrics
from fleet.rl.settings import DEFAULT_SETTINGS, TrainerSettings
from fleet.schedule import require_whole_groups
from fleet.verdicts import outcome_names

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


class FleetRLOOTrainer(DynamicSampling):
    """TRL's RLOOTrainer, fed by RepeatableEpisodeDataset through VLMDataCollator.

    `latest_rollouts` holds the records of the last generation over all devices, the same on every one, and
    `latest_pictures` the pictures of this device's by the names that the records have. Besides TRL's metrics it logs
    rollouts.rollout_metrics, `rollouts_per_s`, `token_ratio` (tokens that would pass through TRL's training pass per
    token that passes through ours), `vision_cache/hit_rate` (of a generation's images), and TRL's `step_time` as
    `step_time_s`. With beta 0 it logs `groups/skipped`, the share of micro-batches whose pass is left out because no
    group of them has an advantage; figures of such a pass are absent. With skips_bad_images it logs
    `images/episodes_replaced` (of a generation, over all devices).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: RLOOConfig,
        dataset: RepeatableEpisodeDataset,
        processing_class: Any,
        settings: TrainerSettings = DEFAULT_SETTINGS,
        *,
        reward_function: RewardProcess | None = None,
        peft_config: PeftConfig | None = None,
        evaluation: tuple[EvaluationPlan, AnswerSettings] | None = None,
        **resumable: Any,
    ):
        """args: `make_rloo_config` says how episodes become TRL's batch sizes. processing_class: pads left.

        reward_function: the user's own in place of Fleet's. evaluation: the held-out episodes that `evaluate` scores,
        and how they are answered. resumable: ResumableTrainer's arguments. Raises ValueError for a split group.
        """
        require_whole_groups(args.per_device_train_batch_size, args.num_generations)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            settings=settings,
            dataset=dataset,
            reward_function=reward_function,
            train_dataset=dataset.as_hf_dataset(num_episodes_of_run(args)),
            # Trainer wants one before it evaluates; `evaluate` has its own
            eval_dataset=None if evaluation is None else dataset.as_hf_dataset(1),
            peft_config=peft_config,
            **resumable,
        )
        # TRL's constructor insists on its own identity collator
        self.data_collator = VLMDataCollator(processing_class, args.num_generations)
        self.evaluation = evaluation
        self.latest_answers: Evaluation | None = None
        self.latest_evaluation: dict[str, Any] | None = None
        self.look_watch: LookWatch | None = None
        self.latest_rollouts: tuple[RolloutRecord, ...] = ()
        self.latest_pictures: dict[str, Image.Image] = {}
        self._rollouts: Rollouts | None = None
        self._prepared: tuple[int, dict[str, Any]] | None = None  # of the micro-step with this number
        self._num_rollouts_since_log, self._last_log_time_s = 0, time.perf_counter()

    def _prepare_inputs(self, generation_batch: EpisodeBatch) -> dict[str, Any]:
        """The groups of this step, as `rollouts` and a slice of them; generates first when a new generation is due.

        Trainer calls it for each micro-step, which TRL counts in `_step`, and gives the result to `_compute_loss`. A
        micro-step that asks twice gets the same.
        """
        steps_per_generation = self.args.steps_per_generation
        if self._prepared is None or self._prepared[0] != self._step:
            if self._rollouts is None or self._step % (steps_per_generation * self.num_iterations) == 0:
                self._rollouts = self._roll_out(generation_batch)
            first = self._step % steps_per_generation * self._groups_per_step
            groups = slice(first, first + self._groups_per_step)
            self._prepared = self._step, {"rollouts": self._rollouts, "groups": groups}
        return self._prepared[1]

    def _teaches(self, inputs: dict[str, Any]) -> list[bool] | None:
        known = inputs["rollouts"].teaches_P
        return None if known is None else known[inputs["groups"]]

    @torch.no_grad()
    def _roll_out(self, batch: EpisodeBatch) -> Rollouts:
        """Samples and rewards G completions of each episode, and scores them where the loss needs it beforehand.

        Every rank takes part.
        """
        rollouts = self._reward(*self._judged_groups(batch))
        sampled = rollouts.sampled
        self.on_activity("scoring")
        every_group = slice(0, len(batch["episodes"]))
        if self.beta != 0.0:
            rollouts.ref_logps_BT = self._score_reference(sampled)
        if needs_old_logps(self.args):
            rollouts.old_logps_BT, _, log_kept_BT = self._score(self.model, sampled)
            rollouts.weights_B = self._weigh_rollouts(sampled, every_group, rollouts.old_logps_BT, log_kept_BT)
        if self.beta == 0.0 or rollouts.old_logps_BT is not None:
            advantages_PG = self._take_advantages(rollouts, every_group, rollouts.old_logps_BT)
            by_device = advantages_PG.view(-1, len(batch["episodes"]), self.num_generations)
            rollouts.teaches_P = (by_device != 0).any(dim=2).any(dim=0).tolist()
        return rollouts

    @torch.no_grad()
    def _take_advantages(self, rollouts: Rollouts, groups: slice, old_logps_BT: Tensor | None) -> Tensor:
        """Fills in the advantages of these groups, and records the rollouts once the last group has its own.

        old_logps_BT: of these groups, for the KL term. Returns the advantages of all devices, device after device, a
        row a group. Every rank takes part.
        """
        rows, kl_BT = rollouts.sampled.rows_of(groups), None
        if old_logps_BT is not None and rollouts.ref_logps_BT is not None:
            mask_BT = rollouts.sampled.completion_mask_BT[rows]
            kl_BT = token_kl(old_logps_BT, rollouts.ref_logps_BT[rows], mask_BT)
            sums_2 = torch.stack([kl_BT.sum(), mask_BT.sum().float()])
            rollouts.kl_and_tokens_2 = sums_2 + (0 if rollouts.kl_and_tokens_2 is None else rollouts.kl_and_tokens_2)
        own_B = shaped_rewards(rollouts.rewards_B[rows], kl_BT, self.beta, self.reward_clip_range)
        shaped_PG = self.accelerator.gather(own_B).view(-1, self.num_generations)
        self.step_guard.note_scores(shaped_PG)
        self._add_metrics(
            {
                "rewards/dropped": shaped_PG.isnan().float().mean().item(),
                "frac_reward_zero_std": (nanstd(shaped_PG, dim=1) < 1e-8).float().mean().item(),
            }
        )
        advantages_PG = leave_one_out_advantages(shaped_PG, normalize=self.normalize_advantages)
        # every device has as many rows as this one
        rollouts.advantages_B[rows] = advantages_PG.view(-1, len(own_B))[self.accelerator.process_index]
        if rows.stop == len(rollouts.records):
            self._record(rollouts)
        return advantages_PG

    def _record(self, rollouts: Rollouts) -> None:
        """Gathers every rollout's record to every rank, and logs their metrics."""
        records = [
            replace(record, advantage=advantage)
            for record, advantage in zip(rollouts.records, rollouts.advantages_B.tolist(), strict=True)
        ]
        images = rollouts.sampled.batch["images"]
        self.latest_pictures = rollouts.pictures_of_tools | {
            name: picture
            for record, pictures in zip(records[:: self.num_generations], images, strict=True)
            for name, picture in zip(record.episode.images, pictures, strict=True)
        }
        self.latest_rollouts = tuple(gather_object(records))
        all_drawn = (*self.latest_rollouts, *gather_object(rollouts.passed_over))
        self.remember([ids for record in all_drawn for ids in record.turn_ids])
        self._num_rollouts_since_log += len(all_drawn)
        names = outcome_names(self.env, self.settings.max_turns)
        self._add_metrics(rollout_metrics(all_drawn, self.num_generations, names))
        if rollouts.kl_and_tokens_2 is not None:
            kl, num_tokens = self.accelerator.reduce(rollouts.kl_and_tokens_2, reduction="sum").tolist()
            self._add_metrics({"kl": kl / max(num_tokens, 1)})

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of these groups. On-policy, the forward pass that is trained on is the policy's only one."""
        self.on_activity("the training pass")
        rollouts, groups = inputs["rollouts"], inputs["groups"]
        sampled, rows = rollouts.sampled, rollouts.sampled.rows_of(groups)
        mask_BT = sampled.completion_mask_BT[rows]
        logps_BT, entropies_BT, log_kept_BT = self._completion_logps(model, sampled, groups)
        if rollouts.old_logps_BT is None:
            old_logps_BT = logps_BT.detach()
            weights_B = self._weigh_rollouts(sampled, groups, old_logps_BT, log_kept_BT)
            if self.beta != 0.0:
                self._take_advantages(rollouts, groups, old_logps_BT)
        else:
            old_logps_BT = rollouts.old_logps_BT[rows]
            weights_B = None if rollouts.weights_B is None else rollouts.weights_B[rows]
        loss, is_clipped_below_B, is_clipped_above_B = clipped_loss(
            sequence_logps(logps_BT, mask_BT),
            sequence_logps(old_logps_BT, mask_BT),
            rollouts.advantages_B[rows],
            self.epsilon_low,
            self.epsilon_high,
            weights_B,
        )
        self._log_loss(entropies_BT, mask_BT, torch.stack([is_clipped_below_B, is_clipped_above_B], dim=1))
        return without_gradient_if_not_finite(loss)

    @torch.no_grad()
    def _log_loss(self, entropies_BT: Tensor, mask_BT: Tensor, is_clipped_B2: Tensor) -> None:
        """Logs TRL's metrics of the training pass, over all devices. is_clipped_B2: below and above."""
        sums_2 = torch.stack([(entropies_BT * mask_BT).sum(), mask_BT.sum().float()])
        entropy, num_tokens = self.accelerator.reduce(sums_2, reduction="sum")
        below_B, above_B = self.accelerator.gather(is_clipped_B2.float()).unbind(dim=1)
        self._add_metrics(
            {
                "entropy": (entropy / num_tokens.clamp(min=1.0)).item(),
                "clip_ratio/low_mean": below_B.mean().item(),
                "clip_ratio/low_min": below_B.min().item(),
                "clip_ratio/high_mean": above_B.mean().item(),
                "clip_ratio/high_max": above_B.max().item(),
                # a rollout's advantage has one sign, so it is clipped on one side at most
                "clip_ratio/region_mean": (below_B + above_B).mean().item(),
            }
        )

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the held-out episodes and logs the figures, on all ranks; training's randomness is left as it was."""
        assert self.evaluation is not None, "no evaluation was given to the trainer"
        start_s = time.perf_counter()
        with self.apart_from_training():
            self.latest_answers = self.answer(*self.evaluation)
            document = self.latest_answers.document
            self.latest_evaluation = document | {"step": self.state.global_step}
            figures = headline_figures(document) | {"seconds": time.perf_counter() - start_s}
            metrics = {f"eval_{name}": value for name, value in figures.items()}
            self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def apart_from_training(self) -> Iterator[None]:
        """Within it the model answers in eval mode, and what is logged is no step's; rollouts_per_s leaves it out."""
        start_s = time.perf_counter()
        self.model.eval()
        yield
        self.model.train()
        self._last_log_time_s += time.perf_counter() - start_s

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


def num_episodes_of_run(args: RLOOConfig) -> int:
    """The episodes that `args.max_steps` optimizer steps draw over all devices: one epoch, so no order repeats.

    The last generation is drawn whole.
    """
    micro_steps = args.max_steps * args.gradient_accumulation_steps
    num_generations = -(-micro_steps // (args.steps_per_generation * args.num_iterations))
    return num_generations * (args.generation_batch_size // args.num_generations)
