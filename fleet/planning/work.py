"""The work of a run's steps: tokens that pass through the model, operations, and the time that a chip allows."""

from dataclasses import dataclass
from typing import Any

from fleet.planning.counted_pass import PassShape
from fleet.qwen.flops import TextWork, text_flops, vision_flops

# operations of a backward pass, by those of the forward pass: one for inputs, one for weights
BACKWARD_OF_INPUTS, BACKWARD_OF_WEIGHTS = 1, 1
# share of the data sheet's operations that packed rows of a 3B reached on an H100, without the vision tower
REACHED_SHARE = 0.37


@dataclass(frozen=True)
class PassesOfStep:
    """One optimizer step on one device.

    num_passes: training passes. num_generated: pieces of generation per step, as a generation may serve several.
    is_trained_on_first: the pass of sampling is the one that is trained on. is_recomputed: by checkpointing.
    trains_weights, trains_vision: else adapters alone, or a frozen vision side. num_scores: passes without gradient.
    """

    num_passes: int
    num_generated: float
    is_recomputed: bool
    trains_weights: bool
    trains_vision: bool
    is_vision_known: bool
    num_scores: int = 0


def step_flops(
    config: Any, training: PassShape, sampling: PassShape, grid: tuple[int, int, int], passes: PassesOfStep
) -> int:
    """Operations of one optimizer step on one device. grid: patches of the largest picture along each axis."""
    text, vision = _forward(config, training, grid)
    if passes.is_vision_known:
        vision = 0
    backward = BACKWARD_OF_INPUTS + (BACKWARD_OF_WEIGHTS if passes.trains_weights else 0)
    again = 1 if passes.is_recomputed else 0
    of_text = text * (1 + again + backward)
    of_vision = vision * (1 + (again + BACKWARD_OF_INPUTS + BACKWARD_OF_WEIGHTS if passes.trains_vision else 0))
    sampled_text, sampled_vision = _forward(config, sampling, grid)
    sampled = sampled_text + (0 if passes.is_vision_known else sampled_vision)
    scored = passes.num_scores * (text + vision)
    return round(passes.num_passes * (of_text + of_vision + scored) + passes.num_generated * sampled)


def _forward(config: Any, shape: PassShape, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Operations of a forward pass through the language model, and through the vision side."""
    pairs = shape.num_rows * shape.num_slots**2
    if not shape.has_tree_mask:
        pairs //= 2
    text = text_flops(config, TextWork(shape.num_rows * shape.num_slots, pairs, shape.num_rows * shape.num_scored))
    patches = grid[0] * grid[1] * grid[2]
    num_images = shape.num_patches // patches if patches else 0
    return text, vision_flops(config, [grid] * num_images)


def seconds_at(flops: int, peak_flops: float | None) -> tuple[float, float] | None:
    """(least, likely) seconds of so many operations on a chip: at its data sheet's rate, and at REACHED_SHARE of it."""
    return None if peak_flops is None else (flops / peak_flops, flops / (peak_flops * REACHED_SHARE))
