"""PolicyPasses: log-probabilities and answers, from the policy and its reference.

A pass takes whole groups, each as one tree of tokens (fleet/qwen), or TRL's rows, one prompt a rollout. The only code
that leans on how TRL scores. Knows no reward and no loss.
"""

import math

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from dataset import repeat_episodes
from fleet.evaluation.answering import AnswerSettings, ModelPolicy, sound_part
from fleet.evaluation.figures import Evaluation, EvaluationPlan, evaluate
from fleet.qwen.group_passes import image_inputs, score_tree
from fleet.qwen.token_tree import by_rollout, lay_out
from fleet.rl.first_pass import as_wide_as
from fleet.rl.group_sampling import GroupSampling, SampledGroups

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


class PolicyPasses(GroupSampling):
    """A trainer that samples as GroupSampling does, and whose scores are Fleet's."""

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
        """Log-probabilities and entropies (b, T) of these groups' completion tokens, from one forward pass.

        That may be the pass that they were sampled in, if it was run with gradients.
        """
        if not sampled.is_packed:
            return self._logps_of_rows(model, sampled, groups)
        if sampled.first_scores is not None and torch.is_grad_enabled():
            return sampled.first_scores
        tree = lay_out(
            sampled.prompts[groups],
            sampled.branches[groups],
            sampled.nodes[groups],
            padding_id=self._tokenizer.pad_token_id,
        )
        behind = [[sampled.pictures[digest] for digest in row] for row in tree.pictures]
        images = image_inputs(sampled.batch, groups, sampled.image_features, behind)
        with self.accelerator.autocast():
            scores = score_tree(model, tree, images, self._attention, self.temperature)
        logps_BT, entropies_BT = (by_rollout(values, tree).flatten(0, 1) for values in scores)
        return as_wide_as(sampled.completion_ids_BT, logps_BT, entropies_BT)

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
        if self.vllm is None or sampled.sampler_logps is None:
            return
        rows, is_last = sampled.rows_of(groups), groups.stop == len(sampled.batch["episodes"])
        mask_BT = sampled.completion_mask_BT[rows]
        sampler_BT = _padded_logps(sampled.sampler_logps[rows], mask_BT)
        self._add_metrics(self.vllm.compare(old_logps_BT, sampler_BT, mask_BT, is_last=is_last))

    def answer(self, plan: EvaluationPlan, settings: AnswerSettings) -> Evaluation:
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
                env=plan.env,
                **place,
                on_progress=lambda num_rows: self.on_activity("evaluation"),
                most_of_ranks=self._most_of_ranks,
            )
            return evaluate(policy, plan, str(self.model.config._name_or_path))


def _padded_logps(rows: list[list[float]], like_BT: Tensor) -> Tensor:
    """The rows as a tensor (B, T) float32 of a tensor's shape, NaN where a row has none."""
    length = like_BT.shape[1]
    padded = [(row + [math.nan] * length)[:length] for row in rows]
    return torch.tensor(padded, dtype=torch.float32, device=like_BT.device)
