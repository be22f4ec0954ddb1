"""The largest passes of a run: training, and the first pass of sampling a generation or held-out answers.

Owns how long prompts, completions and drafts may be together. What a pass of a shape holds is counted_pass.py's.
"""

from dataclasses import dataclass, replace
from typing import Any

from fleet.command.options import Options
from fleet.planning.counted_pass import PassShape
from fleet.planning.lengths import Lengths
from fleet.planning.machine import Launch
from fleet.qwen.drafts import MAX_COMPLETIONS, MAX_DRAFT_TOKENS
from fleet.qwen.group_passes import MAX_MASK_PAIRS
from fleet.qwen.sampling_pieces import num_pieces_of
from fleet.schedule import held_out_prompts_at_a_time


@dataclass(frozen=True)
class RunShapes:
    """The passes of a run. options: resolved."""

    options: Options
    launch: Launch
    config: Any
    lengths: Lengths

    @property
    def completion(self) -> int:
        """The most tokens that a rollout may have, of all turns."""
        assert self.options.max_completion_length
        return self.options.max_completion_length * self.options.max_turns

    @property
    def is_vision_known(self) -> bool:
        """True if images come as features from the cache."""
        return bool(self.options.vision_cache_mib)

    def tree(self) -> tuple[int, int]:
        """(slots behind the prompt, edges) of a group, whose completions are as long as may be and share nothing."""
        size = self.options.num_rollouts
        answers = 0
        if self.options.max_turns > 1:
            # what a tool answers is as long as a picture, and as the words around it
            answers = size * (self.options.max_turns - 1) * (self.lengths.image_tokens[2] + 64)
        return size * (self.completion - 1) + answers, size * self.completion

    def training(self, num_groups: int, *, is_packed: bool) -> PassShape:
        """A training pass. is_packed: a group is one row, else each rollout."""
        length, size = self.lengths.longest_prompt, self.options.num_rollouts
        patches = num_groups * self.lengths.patches
        if is_packed:
            slots, edges = self.tree()
            return PassShape(num_groups, length + slots, edges, patches, are_features_known=self.is_vision_known)
        return PassShape(
            num_groups * size, length + self.completion, self.completion, patches * size, has_tree_mask=False
        )

    def generation(self, num_groups: int) -> PassShape:
        """The first pass over a generation's prompts, with micro-batches of so many groups."""
        num_prompts = num_groups * (self.options.steps_per_generation or 1)
        return self._first_pass(
            num_prompts, has_drafts=self.options.shared_prefix, are_features_known=self.is_vision_known
        )

    def evaluation(self, num_groups: int) -> PassShape | None:
        """The first pass over as many held-out prompts as are answered at a time; None if none are."""
        options = self.options
        evaluated = options.eval_episodes if options.eval_steps else 0
        episodes = max(evaluated, (options.control_episodes or 0) if options.control_steps else 0)
        if not episodes:
            return None
        num_prompts = num_groups * (options.steps_per_generation or 1)
        at_a_time = held_out_prompts_at_a_time(num_prompts, options.num_rollouts)
        return self._first_pass(
            min(at_a_time, -(-episodes // self.launch.num_processes)), has_drafts=True, are_features_known=False
        )

    def _first_pass(self, num_prompts: int, *, has_drafts: bool, are_features_known: bool) -> PassShape:
        attention, drafts = self.options.attn_implementation, 0
        if has_drafts and attention in MAX_MASK_PAIRS:
            drafts = min(MAX_COMPLETIONS * self.completion, MAX_DRAFT_TOKENS)
        slots = self.lengths.longest_prompt + drafts
        return PassShape(
            num_prompts, slots, drafts + 1, num_prompts * self.lengths.patches, are_features_known=are_features_known
        )

    def piece(self, shape: PassShape) -> PassShape:
        """The largest of the pieces that a first pass is done in."""
        vocabulary, num_nodes = self.config.get_text_config().vocab_size, shape.num_scored
        length = shape.num_slots - num_nodes + 1
        pieces = num_pieces_of(shape.num_rows, length, num_nodes, vocabulary, self.options.attn_implementation)
        return with_rows(shape, -(-shape.num_rows // pieces))


def with_rows(shape: PassShape, num_rows: int) -> PassShape:
    """The shape with another number of rows, each with as many patches."""
    return replace(shape, num_rows=num_rows, num_patches=shape.num_patches // shape.num_rows * num_rows)
