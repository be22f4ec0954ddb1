"""The steps that a generation serves, and the groups that a micro-batch holds, in plain integers."""


def optimizer_steps_per_generation(
    steps_per_generation: int, num_iterations: int, gradient_accumulation_steps: int
) -> int:
    """Optimizer steps that one generation serves.

    steps_per_generation: micro-steps over which its rollouts are spread, a multiple of gradient_accumulation_steps.

    >>> optimizer_steps_per_generation(4, 2, 2)
    4
    """
    return steps_per_generation * num_iterations // gradient_accumulation_steps


def require_whole_groups(rollouts_per_micro_batch: int, group_size: int) -> None:
    """Raises ValueError unless every device's micro-batch holds whole groups."""
    if rollouts_per_micro_batch % group_size:
        raise ValueError(
            f"per_device_train_batch_size={rollouts_per_micro_batch} is not a multiple of "
            f"num_generations={group_size}, but a group stays whole on its device; make it one"
        )
