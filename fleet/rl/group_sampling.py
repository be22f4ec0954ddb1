"""GroupSampling: a generation's completions as trees of tokens, and what its next passes need to know of them.

Knows nothing of how they are drawn, no reward and no loss.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataset import EpisodeBatch
from fleet.errors import RunStopped
from fleet.qwen.edge_scores import Scores
from fleet.qwen.flops import add_up, compare_work
from fleet.qwen.group_passes import problem_of_mask, tree_prompts, why_not_to_pack
from fleet.qwen.observations import Picture
from fleet.qwen.token_tree import Branches, PathToken, Prompts, lay_out
from fleet.qwen.tool_answers import ToolAnswers
from fleet.qwen.tree_sampling import Samples
from fleet.rl.drawing import Drawing
from fleet.rl.first_pass import as_wide_as, scores_of_first_pass
from fleet.rl.rollouts import length_metrics
from utils.pieces import in_pieces

logger = logging.getLogger("fleet")

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


@dataclass(frozen=True)
class DrawnGroups:
    """This device's completions of some episodes, P whole groups of G."""

    batch: EpisodeBatch
    completion_ids: list[list[int]]  # B, never empty
    sampler_logps: list[list[float]] | None  # B; of each token under the distribution drawn from; NaN where unknown
    turn_lengths: list[list[int]]  # B; sampled tokens of each turn
    paths: list[list[PathToken]] | None  # B; with what was given between turns, where there may be several
    pictures: Mapping[bytes, Picture]  # that tools have shown, by digest
    image_features: list[Tensor] | None  # one an image from the vision cache, or None for the encoder to run
    samples: Samples | None  # where they were drawn on trees, in one piece

    def turns_of(self, rollout: int) -> list[list[int]]:
        """The sampled tokens of each of a rollout's turns."""
        return in_pieces(self.completion_ids[rollout], self.turn_lengths[rollout])

    def rows_of(self, groups: slice) -> slice:
        """The rollouts of these groups among the B."""
        return slice(groups.start * self.batch["group_size"], groups.stop * self.batch["group_size"])


@dataclass(frozen=True)
class SampledGroups(DrawnGroups):
    """This device's completions of one generation, ready to be scored."""

    completion_ids_BT: Tensor  # int64, right-padded
    completion_mask_BT: Tensor  # int64, 0 on padding and on masked truncated completions
    prompts: Prompts
    branches: list[Branches]  # P; of the completions that are not masked
    nodes: list[list[list[int]]]  # P x G; of each of their tokens
    is_packed: bool  # a forward pass has each group as one row
    first_scores: Scores | None  # (B, T); of round 1


class GroupSampling(Drawing):
    """A trainer that draws as Drawing does, and knows its completions as trees."""

    @property
    def _groups_per_step(self) -> int:
        return self.args.per_device_train_batch_size // self.num_generations

    def _draw_groups(
        self, batch: EpisodeBatch, guesses: Sequence[Sequence[str]], answers: ToolAnswers | None = None
    ) -> DrawnGroups:
        """G completions of each episode. Every rank takes part.

        guesses: of each episode, completions that its environment thinks likely. answers: of its tools, where a
        rollout may have several turns.
        """
        features = self._image_features(batch)
        drawn = self._draw(batch, features, guesses, answers)
        completion_ids = self._usable(drawn.completion_ids)
        logps = None if drawn.logps is None else _as_long_as(completion_ids, drawn.logps)
        self._log_lengths(batch, completion_ids, self._are_ended(completion_ids))
        return DrawnGroups(
            batch,
            completion_ids,
            logps,
            turn_lengths=(None if answers is None else drawn.turn_lengths) or [[len(ids)] for ids in completion_ids],
            paths=None if answers is None else drawn.paths,
            pictures={} if answers is None else answers.pictures,
            image_features=features,
            samples=drawn.samples,
        )

    def _are_ended(self, completion_ids: Sequence[Sequence[int]]) -> list[bool]:
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return [ids[-1] in ends for ids in completion_ids]

    def _sampled(self, drawn: DrawnGroups) -> SampledGroups:
        """These completions with the inputs of their scoring passes. Every rank takes part."""
        batch, completion_ids, device = drawn.batch, drawn.completion_ids, self.accelerator.device
        rows = [torch.tensor(ids) for ids in completion_ids]
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id).to(device)
        mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        if self.mask_truncated_completions:
            mask_BT = mask_BT * torch.tensor(self._are_ended(completion_ids), device=device).unsqueeze(1)
        prompts = tree_prompts(self.accelerator.unwrap_model(self.model), batch)
        branches, nodes = self._trees(drawn.paths or completion_ids, mask_BT)
        is_packed = self._chooses_packing(batch, mask_BT, branches)
        first_scores = None
        if drawn.samples is not None and is_packed:
            first_scores = self._first_scores(prompts, branches, nodes, drawn.samples)
            with torch.enable_grad():
                first_scores = None if first_scores is None else as_wide_as(ids_BT, first_scores)
        return SampledGroups(
            **vars(drawn),
            completion_ids_BT=ids_BT,
            completion_mask_BT=mask_BT,
            prompts=prompts,
            branches=branches,
            nodes=nodes,
            is_packed=is_packed,
            first_scores=first_scores,
        )

    def _first_scores(
        self, prompts: Prompts, branches: list[Branches], nodes: list[list[list[int]]], samples: Samples
    ) -> Scores | None:
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
        self, paths: Sequence[Sequence[PathToken]], mask_BT: Tensor
    ) -> tuple[list[Branches], list[list[list[int]]]]:
        """The P trees of the completions that are not masked, and the nodes of each rollout's sampled tokens."""
        kept = [path if is_kept else [] for path, is_kept in zip(paths, mask_BT[:, 0].tolist(), strict=True)]
        branches = [Branches() for _ in range(len(kept) // self.num_generations)]
        nodes = [branches[place // self.num_generations].add_sampled(path) for place, path in enumerate(kept)]
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
            [(sum(map(bool, group.children[1:])), len(group.sampled_nodes())) for group in branches],
            group_size=self.num_generations,
            padded_lengths=(batch["input_ids"].shape[1], mask_BT.shape[1]),
            grids_thw=batch["image_grid_thw"].tolist(),
            are_features_known=self.vision_cache is not None,
            groups_per_step=self._groups_per_step,
        )
        work = add_up(gather_object([own]))
        reason = None if self.settings.max_turns > 1 else why_not_to_pack(self._attention, work)
        self._log_step_tokens(work.packed_tokens if reason is None else work.unpacked_tokens)
        if self.settings.max_turns > 1:
            # rows of TRL's own hold no tool's answer
            if (problem := problem_of_mask(self._attention, work)) is not None:
                raise RunStopped(f"{problem}, or --max_context_length")
            return True
        if reason is not None:
            self._tell_once("unpacked", f"shared prefix: this generation is trained on as TRL does it: {reason}")
        self._add_metrics({"token_ratio": work.unpacked_tokens / work.packed_tokens if reason is None else 1.0})
        return reason is None

    def _log_step_tokens(self, num_tokens: int) -> None:
        """Logs the tokens that a device's training passes have in an optimizer step. num_tokens: of all devices."""
        share = self.args.gradient_accumulation_steps / self.args.steps_per_generation
        self._add_metrics({"step_tokens": num_tokens / self.accelerator.num_processes * share})


def _as_long_as(completion_ids: Sequence[Sequence[int]], logps: Sequence[Sequence[float]]) -> list[list[float]]:
    """The log-probabilities of the tokens that are left of each completion; NaN for an end that was put there."""
    return [
        [*known[: len(ids)], *[math.nan] * (len(ids) - len(known))]
        for ids, known in zip(completion_ids, logps, strict=True)
    ]
