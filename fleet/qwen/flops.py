"""Operations of a Qwen2.5-VL's forward pass, counted from its configuration and the lengths of its input.

Owns the count that decides if packing a group pays, and the ideal that benchmarks are held against. Counts matrix
products, two operations per multiply-add. Leaves out norms, rotations and softmax, as is usual.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TextWork:
    """The language model's input: tokens, query-key pairs, and scored tokens, which pass through the LM head."""

    num_tokens: int
    num_pairs: int
    num_scored: int


@dataclass(frozen=True)
class WorkComparison:
    """One generation's scoring, forward, as packed rows and as stock TRL's rows."""

    packed_flops: int
    unpacked_flops: int
    packed_tokens: int
    unpacked_tokens: int
    largest_mask_pairs: int  # query-key pairs of the largest packed step


def text_flops(config: Any, work: TextWork) -> int:
    """Operations of the language model and its head; config: a Qwen2_5_VLConfig."""
    text = config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    projections = 2 * text.hidden_size * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    per_token = 2 * (projections + 3 * text.hidden_size * text.intermediate_size)
    return (
        text.num_hidden_layers * (work.num_tokens * per_token + work.num_pairs * 4 * text.hidden_size)
        + 2 * work.num_scored * text.hidden_size * text.vocab_size
    )


def vision_flops(config: Any, grids_thw: Sequence[Sequence[int]]) -> int:
    """Operations of the vision tower and its merger on images of these (time, height, width) patches each."""
    vision = config.vision_config
    hidden, merge = vision.hidden_size, vision.spatial_merge_size
    num_patches = sum(time * height * width for time, height, width in grids_thw)
    # a window is counted whole: its side in patches is a multiple of the merged side
    side = vision.window_size // vision.patch_size
    full_pairs = sum(time * (height * width) ** 2 for time, height, width in grids_thw)
    window_pairs = sum(time * _squares(height, side) * _squares(width, side) for time, height, width in grids_thw)
    num_full, merged_width = len(vision.fullatt_block_indexes), hidden * merge**2
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    per_patch = 2 * hidden * (4 * hidden + 3 * vision.intermediate_size)
    return (
        2 * num_patches * patch_values * hidden
        + vision.depth * num_patches * per_patch
        + 4 * hidden * (num_full * full_pairs + (vision.depth - num_full) * window_pairs)
        + 2 * (num_patches // merge**2) * merged_width * (merged_width + vision.out_hidden_size)
    )


def compare_work(
    config: Any,
    prompt_lengths: Sequence[int],
    trees: Sequence[tuple[int, int]],
    *,
    group_size: int,
    padded_lengths: tuple[int, int],
    grids_thw: Sequence[Sequence[int]],
    are_features_known: bool,
    groups_per_step: int,
) -> WorkComparison:
    """The work of P groups, `groups_per_step` in a forward pass, as trees in packed rows and as TRL's rows.

    prompt_lengths: P, in tokens. trees: P pairs, the slots behind the prompt and the edges. group_size: G.
    padded_lengths: of prompts and completions in TRL's rows. grids_thw: patches of every image of the P prompts.
    are_features_known: packed rows need no encoder.
    """
    steps = [slice(first, first + groups_per_step) for first in range(0, len(prompt_lengths), groups_per_step)]
    packed = [_packed_work(prompt_lengths[step], trees[step]) for step in steps]
    num_rows, length = group_size * len(prompt_lengths), sum(padded_lengths)
    unpacked = TextWork(num_rows * length, num_rows * length * (length + 1) // 2, num_rows * padded_lengths[1])
    vision = vision_flops(config, grids_thw)
    return WorkComparison(
        packed_flops=sum(text_flops(config, work) for work in packed) + (0 if are_features_known else vision),
        unpacked_flops=text_flops(config, unpacked) + vision * group_size,
        packed_tokens=sum(work.num_tokens for work in packed),
        unpacked_tokens=unpacked.num_tokens,
        largest_mask_pairs=max(work.num_pairs for work in packed),
    )


def add_up(work_by_rank: Sequence[WorkComparison]) -> WorkComparison:
    """The work of all ranks together; the largest mask is the largest of any."""
    total = WorkComparison(*map(sum, zip(*map(astuple, work_by_rank), strict=True)))
    return replace(total, largest_mask_pairs=max(work.largest_mask_pairs for work in work_by_rank))


def _packed_work(prompt_lengths: Sequence[int], trees: Sequence[tuple[int, int]]) -> TextWork:
    """Each group as one packed row behind a dense mask, every row as long as the longest."""
    num_slots = max(prompt + slots for prompt, (slots, _) in zip(prompt_lengths, trees, strict=True))
    num_edges = max(edges for _, edges in trees)
    return TextWork(len(trees) * num_slots, len(trees) * num_slots**2, len(trees) * num_edges)


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the pieces that windows of `side` cut `length` into."""
    return length // side * side**2 + (length % side) ** 2
