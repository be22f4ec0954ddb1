"""The count of a run's steps, generations and episodes, in plain integers."""

from typing import Any


def optimizer_steps_per_generation(
    steps_per_generation: int, num_iterations: int, gradient_accumulation_steps: int
) -> int:
    """Optimizer steps that one generation serves.

    steps_per_generation: micro-steps over which its rollouts are spread, a multiple of gradient_accumulation_steps.

    >>> optimizer_steps_per_generation(4, 2, 2)
    4
    """
    return steps_per_generation * num_iterations // gradient_accumulation_steps


def num_episodes_of_run(args: Any) -> int:
    """Episodes that the run of an RLOOConfig draws over all devices; the last generation is drawn whole.

    >>> from types import SimpleNamespace
    >>> steps = {"max_steps": 3, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2}
    >>> num_episodes_of_run(SimpleNamespace(**steps, generation_batch_size=64, num_generations=4))
    16
    """
    micro_steps = args.max_steps * args.gradient_accumulation_steps
    times_generated = -(-micro_steps // (args.steps_per_generation * args.num_iterations))
    return times_generated * (args.generation_batch_size // args.num_generations)


def require_whole_groups(rollouts_per_micro_batch: int, group_size: int) -> None:
    """Raises ValueError unless every device's micro-batch holds whole groups."""
    if rollouts_per_micro_batch % group_size:
        raise ValueError(
            f"per_device_train_batch_size={rollouts_per_micro_batch} is not a multiple of "
            f"num_generations={group_size}, but a group stays whole on its device; make it one"
        )
