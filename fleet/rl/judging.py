"""Judging: whether a generation's episodes can be shown, and what its completions are worth.

Unlike TRL, completions are judged with special tokens visible (TRL strips them), and once each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import nanstd

from dataset import EpisodeBatch, count_faults, require_episodes
from environment import Episode, EpisodeSource
from fleet.own_code.reward_process import RewardProcess
from fleet.rl.group_sampling import SampledGroups
from fleet.rl.guards import RewardGuard, StepGuard
from fleet.rl.rollouts import RolloutRecord, episode_records, make_records
from fleet.rl.settings import TrainerSettings
from fleet.rl.spared_passes import SparedPasses
from fleet.verdicts import Verdict, drafts_on, verdicts_on
from model_utils import decode_completion
from reward import make_trl_reward_function, reward_of

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


@dataclass
class Rollouts:
    """This device's rollouts of one generation, and what is known of them so far."""

    sampled: SampledGroups
    records: list[RolloutRecord]  # B
    rewards_B: Tensor  # float32, from the task alone
    advantages_B: Tensor  # float32, 0 until `_take_advantages`: with a KL term that may be in the training pass
    ref_logps_BT: Tensor | None = None  # float32, with beta > 0
    old_logps_BT: Tensor | None = None  # float32, where needs_old_logps
    kl_and_tokens_2: Tensor | None = None  # float32 sums so far, with beta > 0
    teaches_P: list[bool] | None = None  # False where the advantages are 0 on every device; known from the start alone


class Judging(SparedPasses):
    """A trainer that judges what it sampled, by the environment and by Fleet's reward or the user's own."""

    def __init__(
        self, *, env: EpisodeSource, settings: TrainerSettings, reward_function: RewardProcess | None, **rest: Any
    ):
        """reward_function: the user's own in place of Fleet's. rest: of GroupSampling."""
        super().__init__(
            settings=settings,
            # never called: TRL logs rewards under its name, and `_rewards` makes them
            reward_funcs=reward_function or make_trl_reward_function(),
            **rest,
        )
        self.env = env
        self.reward_guard = None if reward_function is None else RewardGuard(reward_function)
        self.step_guard = StepGuard(self.accelerator, settings.max_skipped_steps, self.is_at_generation_end)
        self.add_callback(self.step_guard)

    def _require_shown(self, batch: EpisodeBatch) -> list[list[str]]:
        """The environment's drafts for each episode.

        Raises RunStopped on every rank unless each episode of all ranks, or its replacement, can be shown.
        """
        sound = [] if any(batch["broken"]) or not self.draws_on_trees else batch["episodes"]
        guesses, unguessed = drafts_on(self.env, sound)
        found = gather_object([([*batch["broken"], unguessed], batch["faults"])])
        require_episodes([broken for broken, _ in found])
        is_skipping = self.settings.skips_bad_images
        num_replaced = count_faults([faults for _, faults in found], skips_bad_images=is_skipping)
        if is_skipping:
            self._add_metrics({"images/episodes_replaced": float(num_replaced)})
        return guesses

    def _judge_and_reward(self, sampled: SampledGroups) -> Rollouts:
        """This device's completions, each judged once and rewarded; logs the rewards of all devices.

        Raises RunStopped on all processes if the environment or the user's reward function is broken on any.
        """
        batch, processor = sampled.batch, self.processing_class
        episodes_B = [episode for episode in batch["episodes"] for _ in range(batch["group_size"])]
        completions = [decode_completion(processor, ids, self.eos_token_ids) for ids in sampled.completion_ids]
        reasons = self.settings.allow_reasoning
        verdicts, broken = verdicts_on(self.env, episodes_B, completions, allow_reasoning=reasons)
        seen, unseen = episode_records(self.env, batch["episodes"], batch["image_digests"], batch["numbers"])
        require_episodes(gather_object([[broken, unseen]]))
        rewards, first_dropped = self._rewards(sampled, episodes_B, completions, verdicts)
        self.step_guard.begin_generation(first_dropped)
        rewards_B = torch.tensor(rewards, device=self.accelerator.device) * self.reward_weights[0].item()
        self._log_rewards(self.accelerator.gather(rewards_B))
        records = make_records(
            seen, completions, verdicts, rewards_B.tolist(), sampled.completion_ids, sampled.sampler_logps
        )
        return Rollouts(sampled, records, rewards_B, advantages_B=torch.zeros_like(rewards_B))

    def _rewards(
        self, sampled: SampledGroups, episodes_B: list[Episode], completions: list[str], verdicts: list[Verdict]
    ) -> tuple[list[float], str | None]:
        """The B rewards, from the verdicts or the user's reward function, and the first dropped value, in words.

        A dropped value is NaN among the rewards; a verdict's reward is never dropped.
        """
        if self.reward_guard is None:
            return [reward_of(verdict, self.settings.reward_weights) for verdict in verdicts], None
        batch = sampled.batch
        return self.reward_guard(
            completions,
            self.state.global_step + 1,
            prompts=[prompt for prompt in batch["prompts"] for _ in range(batch["group_size"])],
            completion_ids=[list(ids) for ids in sampled.completion_ids],
            correct_index=[episode.correct_index for episode in episodes_B],
            num_candidates=[episode.num_candidates for episode in episodes_B],
            episode=episodes_B,
            verdict=verdicts,
            trainer_state=self.state,
        )

    def _log_rewards(self, rewards_B: Tensor) -> None:
        """Logs TRL's metrics of the rewards of all devices, NaN where one was dropped."""
        mean, deviation = rewards_B.nanmean().item(), nanstd(rewards_B).item()
        name = f"rewards/{self.reward_func_names[0]}"
        self._add_metrics({"reward": mean, "reward_std": deviation, f"{name}/mean": mean, f"{name}/std": deviation})
