"""What of RLOO needs no model: advantages from rewards, and how a run deals episodes to devices and steps."""

import torch
from torch import Tensor
from trl import RLOOConfig

from fleet.schedule import num_episodes_of_run

# Axes: P episodes (groups), G rollouts of each.


def leave_one_out_advantages(rewards_PG: Tensor, *, normalize: bool = False) -> Tensor:
    """Advantage of each rollout over the mean of its siblings.

    rewards_PG: (P, G) float, G >= 2; NaN marks a rollout that could not be scored: it is nobody's sibling and its
    advantage is 0, as is that of a rollout without a scored sibling. Returns (P, G); each row sums to 0.
    normalize: scale the advantages of all scored rollouts together to mean 0 and unit deviation.
    Raises ValueError if G < 2 or a reward is infinite.
    Source: "Back to Basics", arXiv 2402.14740, the RLOO estimator.

    >>> leave_one_out_advantages(torch.tensor([[1., 0., 0., 0.]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"{rewards_PG.shape[1]} rollout per episode, but leave-one-out needs at least 2; pass --num_rollouts 4"
        )
    if torch.isinf(rewards_PG).any():
        raise ValueError("a reward is infinite, and one such reward destroys the policy; return finite numbers")
    num_siblings_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True) - 1
    siblings_sum_PG = rewards_PG.nansum(dim=1, keepdim=True) - rewards_PG
    advantages_PG = rewards_PG - siblings_sum_PG / num_siblings_P1
    if normalize:
        scored = advantages_PG[~advantages_PG.isnan()]
        advantages_PG = (advantages_PG - scored.mean()) / (scored.std() + 1e-4)  # as TRL guards against a tie of all
    return advantages_PG.nan_to_num(nan=0.0)


def refuse_split_groups(args: RLOOConfig) -> None:
    """Raises ValueError unless every device's micro-batch holds whole groups."""
    if args.per_device_train_batch_size % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} is not a multiple of "
            f"num_generations={args.num_generations}, but a group stays whole on its device; make it one"
        )


def num_episodes_of_args(args: RLOOConfig) -> int:
    """How many episodes `args.max_steps` optimizer steps draw over all devices: one epoch, so no order repeats."""
    return num_episodes_of_run(
        args.max_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        episodes_per_micro_step=args.generation_batch_size // args.steps_per_generation // args.num_generations,
    )


def needs_old_logps(args: RLOOConfig) -> bool:
    """Whether the sampling policy's log-probabilities need a pass of their own, before a generation's first step.

    They do where a generation serves several optimizer steps. Where it serves one, the step's own forward pass has
    them, unless advantages that contain them are normalized over several micro-batches.
    """
    is_used_once = args.num_iterations == 1 and args.gradient_accumulation_steps % args.steps_per_generation == 0
    return not is_used_once or (args.beta != 0.0 and args.normalize_advantages and args.steps_per_generation > 1)
