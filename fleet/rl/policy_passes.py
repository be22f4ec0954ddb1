"""PolicyPasses: log-probabilities and answers, from the policy and its reference.

A pass takes whole groups, each as one tree of tokens (fleet/qwen), or TRL's rows, one prompt a rollout. The only code
that leans on how TRL scores. Knows no reward and no loss.
"""

import math

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dataset import repeat_episodes
from fleet.evaluation.answering import AnswerSettings, ModelPolicy, sound_part
from fleet.evaluation.figures import Evaluation, EvaluationPlan, evaluate
from fleet.qwen.edge_scores import Nucleus, Scores, scores_of
from fleet.qwen.group_passes import image_inputs, score_tree
from fleet.qwen.token_tree import by_rollout, lay_out
from fleet.rl.algorithm import rollout_weights
from fleet.rl.first_pass import as_wide_as
from fleet.rl.group_sampling import GroupSampling, SampledGroups
from fleet.rl.vllm_sampling import weight_metrics

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


class PolicyPasses(GroupSampling):
    """A trainer that samples as GroupSampling does, and whose scores are Fleet's."""

    def _score_reference(self, sampled: SampledGroups) -> Tensor:
        """The completions' log-probabilities (B, T) under the reference: another model, or this one's base."""
        if self.ref_model is not None:
            return self._score(self.ref_model, sampled).logps
        # TRL keeps a copy of an adapter that training began with as "ref"; a new one begins at zero, as the bare base
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._score(self.model, sampled).logps

    @torch.no_grad()
    def _score(self, model: nn.Module, sampled: SampledGroups) -> Scores:
        """The completions' scores (B, T) under a model without entropies, as many groups at a time as a step has."""
        size = self._groups_per_step
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            parts = [
                self._completion_logps(model, sampled, slice(first, first + size))
                for first in range(0, len(sampled.batch["episodes"]), size)
            ]
        kept = [part.log_kept for part in parts if part.log_kept is not None]
        return Scores(torch.cat([part.logps for part in parts]), None, torch.cat(kept) if kept else None)

    def _completion_logps(self, model: nn.Module, sampled: SampledGroups, groups: slice) -> Scores:
        """The scores (b, T) of these groups' completion tokens, from one forward pass.

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
            scores = score_tree(model, tree, images, self._attention, self.temperature, self._nucleus)
        of_rollouts = (None if values is None else by_rollout(values, tree).flatten(0, 1) for values in scores)
        return as_wide_as(sampled.completion_ids_BT, Scores(*of_rollouts))

    def _logps_of_rows(self, model: nn.Module, sampled: SampledGroups, groups: slice) -> Scores:
        """The scores from TRL's own pass, which has a prompt for each rollout; from a like one where it lacks some."""
        rows = sampled.rows_of(groups)
        ids_BT, mask_BT = sampled.completion_ids_BT[rows], sampled.completion_mask_BT[rows]
        prompts = repeat_episodes(sampled.batch, groups.start, groups.stop)
        inputs = {
            "input_ids": torch.cat([prompts["prompt_ids"], ids_BT], dim=1),
            "attention_mask": torch.cat([prompts["prompt_mask"], mask_BT], dim=1),
            "pixel_values": prompts["pixel_values"],
            "image_grid_thw": prompts["image_grid_thw"],
            # completions hold no image tokens
            "mm_token_type_ids": torch.cat([prompts["mm_token_type_ids"], torch.zeros_like(ids_BT)], dim=1),
        }
        length = ids_BT.shape[1]
        if self._nucleus is not None and self._nucleus.top_p < 1.0:
            # TRL's head gives no distributions, which are large; a slot predicts the token behind it
            with self.accelerator.autocast():
                logits_BTV = model(**inputs, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
                return scores_of(logits_BTV, ids_BT, self.temperature, self._nucleus)
        logps_BT, entropies_BT, _ = self._get_per_token_logps_and_entropies(
            model,
            logits_to_keep=length,
            compute_entropy=torch.is_grad_enabled(),
            num_images=prompts["num_images"],
            **inputs,
        )
        return Scores(logps_BT, entropies_BT)

    @property
    def _nucleus(self) -> Nucleus | None:
        """The tokens that vLLM may draw, where its log-probabilities weigh rollouts. None elsewhere.

        In TRL's rows it has no part with top_p 1: it bans media tokens alone, and a trained policy gives those no mass.
        """
        if self.vllm is None or self.settings.correction_cap is None:
            return None
        return Nucleus(self.top_p, tuple(self._media_ids))

    def _weigh_rollouts(
        self, sampled: SampledGroups, groups: slice, old_logps_BT: Tensor, log_kept_BT: Tensor | None
    ) -> Tensor | None:
        """The weights (b,) of these groups' rollouts, compared with vLLM's figures first; None where all count as 1.

        old_logps_BT, log_kept_BT: of these groups, as numbers. Every rank takes part.
        """
        if self.vllm is None or sampled.sampler_logps is None:
            return None
        rows, is_last = sampled.rows_of(groups), groups.stop == len(sampled.batch["episodes"])
        mask_BT = sampled.completion_mask_BT[rows]
        sampler_BT = _padded_logps(sampled.sampler_logps[rows], mask_BT)
        target_BT = old_logps_BT if log_kept_BT is None else old_logps_BT - log_kept_BT
        top_p = self.top_p if log_kept_BT is None else 1.0
        self._add_metrics(self.vllm.compare(target_BT, sampler_BT, mask_BT, top_p=top_p, is_last=is_last))
        cap = self.settings.correction_cap
        if cap is None:
            return None
        weights_B = rollout_weights(target_BT.float(), sampler_BT, mask_BT, cap)
        is_weighed_B = (mask_BT.bool() & ~sampler_BT.isnan()).any(dim=1)
        gathered_B2 = self.accelerator.gather(torch.stack([weights_B, is_weighed_B.float()], dim=1))
        self._add_metrics(weight_metrics(gathered_B2[gathered_B2[:, 1] == 1, 0], cap))
        return weights_B

    def answer(self, plan: EvaluationPlan, settings: AnswerSettings) -> Evaluation:
        """The figures of the policy's answers to held-out episodes, the same on every rank; all take part."""
        place = {"rank": self.accelerator.process_index, "num_ranks": self.accelerator.num_processes}
        plan = sound_part(plan, **place, skips_bad_images=self.settings.skips_bad_images)
        with self._policy_that_samples() as model:
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
