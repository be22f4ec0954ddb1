"""How a run's episodes are shared out among steps, micro-batches and passes, in plain integers."""

# a pass over fewer prompts leaves much of a GPU idle
MIN_HELD_OUT_PROMPTS = 8


def optimizer_steps_per_generation(
    steps_per_generation: int, num_iterations: int, gradient_accumulation_steps: int
) -> int:
    """Optimizer steps that one generation serves.

    steps_per_generation: micro-steps over which its rollouts are spread, a multiple of gradient_accumulation_steps.

    >>> optimizer_steps_per_generation(4, 2, 2)
    4
    """
    return steps_per_generation * num_iterations // gradient_accumulation_steps


def held_out_prompts_at_a_time(prompts_per_generation: int, group_size: int) -> int:
    """Held-out prompts that a device answers at a time: as a generation has, or a few where it has as many rollouts.

    >>> held_out_prompts_at_a_time(16, 8), held_out_prompts_at_a_time(1, 16), held_out_prompts_at_a_time(1, 4)
    (16, 8, 4)
    """
    return max(prompts_per_generation, min(prompts_per_generation * group_size, MIN_HELD_OUT_PROMPTS))


def require_whole_groups(rollouts_per_micro_batch: int, group_size: int) -> None:
    """Raises ValueError unless every device's micro-batch holds whole groups."""
    if rollouts_per_micro_batch % group_size:
        raise ValueError(
            f"per_device_train_batch_size={rollouts_per_micro_batch} is not a multiple of "
            f"num_generations={group_size}, but a group stays whole on its device; make it one"
        )
