"""Judging: whether a generation's episodes can be shown, and what its completions are worth.

Unlike TRL, completions are judged with special tokens visible (TRL strips them), and once each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from trl.trainer.utils import nanstd

from dataset import EpisodeBatch, count_faults, require_episodes
from environment import EpisodeSource
from fleet.known_answers import drafts_on
from fleet.own_code.reward_process import RewardProcess
from fleet.qwen.tool_answers import ToolAnswers, TurnSettings, tool_answers
from fleet.rl.group_sampling import DrawnGroups, SampledGroups
from fleet.rl.guards import RewardGuard, StepGuard
from fleet.rl.rollouts import RolloutRecord, TurnRecord, episode_records, make_records
from fleet.rl.settings import TrainerSettings
from fleet.rl.spared_passes import SparedPasses
from fleet.verdicts import verdicts_on
from model_utils import decode_completion
from reward import make_trl_reward_function, reward_of

Value = TypeVar("Value")

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


@dataclass(frozen=True)
class JudgedGroups:
    """This device's completions of some episodes, P groups of G, and the verdicts on them."""

    drawn: DrawnGroups
    records: list[RolloutRecord]  # B; without reward and advantage
    pictures_of_tools: dict[str, Image.Image]  # that tools' answers held, by the records' names

    @property
    def num_groups(self) -> int:
        """P."""
        return len(self.drawn.batch["episodes"])

    def records_of(self, place: int) -> list[RolloutRecord]:
        """The records of the group at this place."""
        size = self.drawn.batch["group_size"]
        return self.records[place * size : (place + 1) * size]

    def settled_places(self) -> list[int]:
        """The places of groups whose verdicts are all right or all wrong, in order."""
        return [
            place
            for place in range(self.num_groups)
            if len({record.verdict.is_right for record in self.records_of(place)}) == 1
        ]


@dataclass
class Rollouts:
    """This device's rollouts of one generation, and what is known of them so far."""

    sampled: SampledGroups
    records: list[RolloutRecord]  # B
    rewards_B: Tensor  # float32, from the task alone
    advantages_B: Tensor  # float32, 0 until `_take_advantages`: with a KL term that may be in the training pass
    ref_logps_BT: Tensor | None = None  # float32, with beta > 0
    old_logps_BT: Tensor | None = None  # float32, where needs_old_logps
    weights_B: Tensor | None = None  # float32, of rollout_weights, where old_logps_BT and a sampler's are known
    kl_and_tokens_2: Tensor | None = None  # float32 sums so far, with beta > 0
    passed_over: list[RolloutRecord] = field(default_factory=list)  # of whole groups that were replaced
    pictures_of_tools: dict[str, Image.Image] = field(default_factory=dict)  # of JudgedGroups
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

    def _judge(self, drawn: DrawnGroups, answers: ToolAnswers | None) -> JudgedGroups:
        """This device's completions, each judged once.

        Raises RunStopped on all processes if the environment is broken on any.
        """
        batch, max_turns = drawn.batch, self.settings.max_turns
        episodes_B = _by_rollout(batch, batch["episodes"])
        texts_B = [list(map(self._text_of, drawn.turns_of(place))) for place in range(len(episodes_B))]
        completions = ["\n".join(texts) for texts in texts_B]
        reasons = self.settings.allow_reasoning
        said = completions if max_turns == 1 else texts_B
        verdicts, broken = verdicts_on(self.env, episodes_B, said, allow_reasoning=reasons, max_turns=max_turns)
        seen, unseen = episode_records(self.env, batch["episodes"], batch["image_digests"], batch["numbers"], max_turns)
        unanswered = None if answers is None else answers.broken
        require_episodes(gather_object([[unanswered, broken, unseen]]))
        turns, pictures = (None, {}) if answers is None else self._turn_records(drawn, answers)
        unknown = [math.nan] * len(completions)
        of_tokens = drawn.completion_ids, drawn.sampler_logps, turns
        return JudgedGroups(drawn, make_records(seen, completions, verdicts, unknown, *of_tokens), pictures)

    def _reward(self, judged: JudgedGroups, passed_over: list[RolloutRecord]) -> Rollouts:
        """These groups as they are trained on, rewarded; logs the rewards of all devices.

        passed_over: the records of groups that they replaced. Raises RunStopped on all processes if the user's reward
        function is broken on any.
        """
        sampled, records = self._sampled(judged.drawn), judged.records
        rewards, first_dropped = self._rewards(sampled, records)
        self.step_guard.begin_generation(first_dropped)
        rewards_B = torch.tensor(rewards, device=self.accelerator.device) * self.reward_weights[0].item()
        self._log_rewards(self.accelerator.gather(rewards_B))
        return Rollouts(
            sampled,
            [replace(record, reward=reward) for record, reward in zip(records, rewards_B.tolist(), strict=True)],
            rewards_B,
            advantages_B=torch.zeros_like(rewards_B),
            passed_over=passed_over,
            pictures_of_tools=judged.pictures_of_tools,
        )

    def _turn_records(
        self, drawn: DrawnGroups, answers: ToolAnswers
    ) -> tuple[list[list[TurnRecord]], dict[str, Image.Image]]:
        """The turns of this device's rollouts with what tools answered, and the pictures in the answers, by name.

        Says once if an answer could not be shown. Every rank takes part.
        """
        problem = next((first for (first, *_) in filter(None, gather_object([answers.problems[:1]]))), None)
        if problem is not None:
            self._tell_once("bad observation", f"a tool's answer cannot be shown, which ends a rollout: {problem}")
        records, pictures = list[list[TurnRecord]](), dict[str, Image.Image]()
        for place in range(len(drawn.completion_ids)):
            turns = drawn.turns_of(place)
            observations = answers.observations(place // self.num_generations, turns[:-1])
            of_rollout = [
                TurnRecord(self._text_of(ids), len(ids), observation.text, observation.names)
                for ids, observation in zip(turns, observations, strict=False)
            ]
            records.append([*of_rollout, TurnRecord(self._text_of(turns[-1]), len(turns[-1]))])
            for observation in observations:
                pictures |= zip(observation.names, observation.images, strict=True)
        return records, pictures

    def _rewards(self, sampled: SampledGroups, records: list[RolloutRecord]) -> tuple[list[float], str | None]:
        """The B rewards, from the verdicts or the user's reward function, and the first dropped value, in words.

        A dropped value is NaN among the rewards; a verdict's reward is never dropped.
        """
        if self.reward_guard is None:
            return [reward_of(record.verdict, self.settings.reward_weights) for record in records], None
        episodes_B = _by_rollout(sampled.batch, sampled.batch["episodes"])
        return self.reward_guard(
            [record.completion for record in records],
            self.state.global_step + 1,
            prompts=_by_rollout(sampled.batch, sampled.batch["prompts"]),
            completion_ids=[list(ids) for ids in sampled.completion_ids],
            correct_index=[episode.correct_index for episode in episodes_B],
            num_candidates=[episode.num_candidates for episode in episodes_B],
            episode=episodes_B,
            verdict=[record.verdict for record in records],
            trainer_state=self.state,
        )

    def _log_rewards(self, rewards_B: Tensor) -> None:
        """Logs TRL's metrics of the rewards of all devices, NaN where one was dropped."""
        mean, deviation = rewards_B.nanmean().item(), nanstd(rewards_B).item()
        name = f"rewards/{self.reward_func_names[0]}"
        self._add_metrics({"reward": mean, "reward_std": deviation, f"{name}/mean": mean, f"{name}/std": deviation})


def _by_rollout(batch: EpisodeBatch, of_episodes: Sequence[Value]) -> list[Value]:
    """The P values as B, each once for every rollout."""
    return [value for value in of_episodes for _ in range(batch["group_size"])]
