"""Judging: whether a generation's episodes can be shown, and what its completions are worth.

Unlike TRL, completions are judged with special tokens visible (TRL strips them), and once each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from trl.trainer.utils import nanstd

from dataset import EpisodeBatch, count_faults, require_episodes
from environment import Episode, EpisodeSource
from fleet.known_answers import drafts_on
from fleet.own_code.reward_process import RewardProcess
from fleet.qwen.tool_answers import ToolAnswers, TurnSettings, tool_answers
from fleet.rl.group_sampling import SampledGroups
from fleet.rl.guards import RewardGuard, StepGuard
from fleet.rl.rollouts import RolloutRecord, TurnRecord, episode_records, make_records
from fleet.rl.settings import TrainerSettings
from fleet.rl.spared_passes import SparedPasses
from fleet.verdicts import Verdict, verdicts_on
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
    pictures_of_tools: dict[str, Image.Image] = field(default_factory=dict)  # that answers held, by the records' names
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

    def _tool_answers(self, batch: EpisodeBatch) -> ToolAnswers | None:
        """What tools answer to this device's groups; None where a rollout has one turn."""
        settings, model = self.settings, self.accelerator.unwrap_model(self.model)
        turns = TurnSettings(
            settings.max_turns,
            self.args.max_completion_length,
            settings.max_context,
            settings.image_max_pixels,
            settings.allow_reasoning,
        )
        return tool_answers(self.env, batch, model, self.processing_class, self._text_of, turns, self.vision_cache)

    def _text_of(self, ids: Sequence[int]) -> str:
        return decode_completion(self.processing_class, ids, self.eos_token_ids)

    def _judge_and_reward(self, sampled: SampledGroups, answers: ToolAnswers | None) -> Rollouts:
        """This device's completions, each judged once and rewarded; logs the rewards of all devices.

        Raises RunStopped on all processes if the environment or the user's reward function is broken on any.
        """
        batch, max_turns = sampled.batch, self.settings.max_turns
        episodes_B = [episode for episode in batch["episodes"] for _ in range(batch["group_size"])]
        texts_B = [list(map(self._text_of, sampled.turns_of(place))) for place in range(len(episodes_B))]
        completions = ["\n".join(texts) for texts in texts_B]
        reasons = self.settings.allow_reasoning
        said = completions if max_turns == 1 else texts_B
        verdicts, broken = verdicts_on(self.env, episodes_B, said, allow_reasoning=reasons, max_turns=max_turns)
        seen, unseen = episode_records(self.env, batch["episodes"], batch["image_digests"], batch["numbers"], max_turns)
        unanswered = None if answers is None else answers.broken
        require_episodes(gather_object([[unanswered, broken, unseen]]))
        rewards, first_dropped = self._rewards(sampled, episodes_B, completions, verdicts)
        self.step_guard.begin_generation(first_dropped)
        rewards_B = torch.tensor(rewards, device=self.accelerator.device) * self.reward_weights[0].item()
        self._log_rewards(self.accelerator.gather(rewards_B))
        turns, pictures = (None, {}) if answers is None else self._turn_records(sampled, answers)
        records = make_records(
            seen, completions, verdicts, rewards_B.tolist(), sampled.completion_ids, sampled.sampler_logps, turns
        )
        return Rollouts(
            sampled, records, rewards_B, advantages_B=torch.zeros_like(rewards_B), pictures_of_tools=pictures
        )

    def _turn_records(
        self, sampled: SampledGroups, answers: ToolAnswers
    ) -> tuple[list[list[TurnRecord]], dict[str, Image.Image]]:
        """The turns of this device's rollouts with what tools answered, and the pictures in the answers, by name.

        Says once if an answer could not be shown. Every rank takes part.
        """
        problem = next((first for (first, *_) in filter(None, gather_object([answers.problems[:1]]))), None)
        if problem is not None:
            self._tell_once("bad observation", f"a tool's answer cannot be shown, which ends a rollout: {problem}")
        records, pictures = list[list[TurnRecord]](), dict[str, Image.Image]()
        for place in range(len(sampled.completion_ids)):
            turns = sampled.turns_of(place)
            observations = answers.observations(place // self.num_generations, turns[:-1])
            of_rollout = [
                TurnRecord(self._text_of(ids), len(ids), observation.text, observation.names)
                for ids, observation in zip(turns, observations, strict=False)
            ]
            records.append([*of_rollout, TurnRecord(self._text_of(turns[-1]), len(turns[-1]))])
            for observation in observations:
                pictures |= zip(observation.names, observation.images, strict=True)
        return records, pictures

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
